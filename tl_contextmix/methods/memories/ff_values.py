"""What feed-forward values promote (Geva, Schuster, Berant, Levy 2021, EMNLP, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import layers_of, with_dictionaries
from tl_contextmix.adapters.inputs import Given, Input, Labels, make_batch, name_tokens, word_table
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import ModelView, select_blocks
from tl_contextmix.core.readout import TILE_BYTES, Scan, Unembedding, unembedding
from tl_contextmix.core.token_sums import blocks
from tl_contextmix.core.validation import LATER, Layers, Positive
from tl_contextmix.engine.memory_coefficients import (
    experts_of,
    require_feed_forward,
    require_predicting,
    values,
)
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, UnsupportedModel, seen
from tl_contextmix.results import ValueReadouts
from tl_contextmix.results.axes import positions

ValueProjection = Literal["none", "folded", "frozen", "head"]
Via = Annotated[tuple[int, int], LATER]
_KNOWN = ("none", "folded", "frozen", "head")
_VECTORS = 4096


@method(cites=("geva2021transformer", "geva2022transformer"), on_text=False)
def ff_values(
    model: object,
    *,
    layer: Layers | None = None,
    neurons: Layers | None = None,
    dictionary: Dictionaries = None,
    via: Via | None = None,
    k: Positive = 10,
    projection: ValueProjection | None = None,
    text: Input | None = None,
    labels: Labels | None = None,
    max_bytes: Positive = TILE_BYTES,
) -> ValueReadouts:
    r"""Returns the tokens that feed-forward values promote and demote.

    .. math:: p_i = \mathrm{softmax}(v_i W_U)

    (2021, section 4), for the value :math:`v_i` and, as a memory with a negative coefficient
    promotes what its value demotes, for :math:`-v_i`. In a gated block the coefficient is negative
    where gate and linear branch differ in sign: the quadrants ``++`` and ``--`` read side 0,
    ``+-`` and ``-+`` side 1. Without options: every value of the model.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        layer: Layer or layers; None for all.
        neurons: Neuron or neurons of each of these layers; None for all.
        dictionary: A `Dictionary`, or several, whose features take the place of neurons (rows of
            W_dec that of values); ``layer=None`` is then where they stand.
        via: ``(layer, head)`` of a later layer: what the head makes of a value that it reads,
            :math:`v_i W_V W_O`, takes the place of the value (Yu & Ananiadou 2024, section 4.4:
            shallow neurons speak through heads). Centring and gain of the norm in front of
            attention are folded in, its scale and the head's attention are positive factors, and
            what other layers make of the value is left out. ``layer=None`` is then all before it.
        k: How many tokens at either end.
        projection: ``"none"``: W_U alone (the paper's model has no final norm). ``"folded"``:
            centring and gain of the final norm before it, which is the direction that reaches the
            logits. ``"frozen"``: that, divided by the mean scale the final norm has on ``text``:
            only then are probabilities those of a coefficient of 1. ``"head"``: the masked-LM
            head in full, biases included. None: ``"head"`` where there is one, else ``"folded"``.
            b_U and the norm's bias are no part of a value and are omitted, except by ``"head"``.
            A norm of the sublayer's output (Gemma 2, OLMo 2) is folded in.
        text: What the scale is taken from, for ``"frozen"`` only.
        labels: Names of the token ids, see `Inputs`.
        max_bytes: Workspace for a tile of logits, besides W_U, the values and the result.

    Returns:
        `ValueReadouts`: one row per value.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model has no trained vocabulary readout.

    Cost: ``2 N d_model d_vocab`` operations for N values, twice that with ``"head"``; no tensor
    as long as the vocabulary is made.
    """
    view = name_tokens(with_dictionaries(as_view(model), dictionary), labels)
    require_predicting(view, view.base_stack(None))
    reader = unembedding(view.readout, projection, _KNOWN)
    if layer is None and dictionary is not None:
        layer = layers_of(view, view.base_stack(None))
    last, through = (None, None) if via is None else _head(view, via)
    if layer is None and last is not None:
        layer = range(last) if last else 0
    chosen = [
        (block, positions("neuron", neurons, range(require_feed_forward(block).width)))
        for block in select_blocks(view.blocks(), layer)
    ]
    if last is not None and (not chosen or any(block.layer >= last for block, _ in chosen)):
        raise InvalidInput(
            "a head reads only what layers before it wrote",
            f"via={via} and layers {[block.layer for block, _ in chosen]}",
            f"layers below {last}",
            "Name lower layers, or a head of a later one.",
        )
    with torch.no_grad():
        scale = _scale(view, reader, text)
        found = [
            _read(reader, block, some, scale, k, max_bytes, view.device, through)
            for block, some in chosen
        ]
    scan, norms = Scan.join([one for one, _ in found]), torch.cat([one for _, one in found])
    numbers = [(block.layer, neuron) for block, some in chosen for neuron in some]
    layers, neuron = torch.tensor(numbers).T
    experts = [experts_of(require_feed_forward(block), some) for block, some in chosen]
    expert = (
        None
        if all(one is None for one in experts)
        else torch.cat(
            [
                torch.full((len(some),), -1) if one is None else one
                for one, (_, some) in zip(experts, chosen, strict=True)
            ]
        )
    )
    options = {"projection": reader.projection, "k": k, "scale": scale}
    options |= {} if via is None else {"via": [*via]}
    return ValueReadouts(
        layer=layers,
        neuron=neuron,
        ids=scan.ids.cpu(),
        logits=scan.ends.cpu(),
        max_prob=scan.max_prob.cpu(),
        entropy=scan.entropy.cpu(),
        norm=norms.cpu(),
        words=word_table(view, scan.ids),
        provenance=provenance(view, "ff_values", options),
        expert=expert,
    )


def _head(view: ModelView, via: Any) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Returns the layer of a head, and what it makes of vectors up to a positive factor.

    Raises:
        InvalidInput: If there is no such head.
        UnsupportedModel: If that is no linear map that weights alone tell.
    """
    if not isinstance(via, (tuple, list)) or len(via) != 2:
        raise InvalidInput(
            "via= names no head", seen(via), "(layer, head)", "Pass a pair of numbers."
        )
    (block,) = select_blocks(view.blocks(), via[0])
    block.require_attention()
    head = block.attention("self")
    (number,) = positions("head", via[1], range(len(head.W_V)))
    kinds = {
        "norms of the residual sum in between": head.norm_after is not None,
        "a norm of its values": head.value_norm is not None,
        "a gate": bool(head.gate),
    }
    if any(kinds.values()):
        raise UnsupportedModel(
            f"weights alone do not tell what a head of {view.name} makes of a value",
            ", ".join(name for name, there in kinds.items() if there),
            "a pre-LN block whose heads are linear in what they read",
            "Leave via out, or ask query_contributions about a text.",
        )

    def through(vectors: Tensor) -> Tensor:
        read = vectors if head.norm_in is None else head.norm_in.linear(vectors)
        written = read @ head.W_V[number] @ head.W_O[number]
        return written if head.norm_out is None else head.norm_out.linear(written)

    return block.layer, through


def _read(
    reader: Unembedding,
    block: Block,
    neurons: list[int],
    scale: float,
    k: int,
    max_bytes: int,
    device: torch.device,
    through: Callable[[Tensor], Tensor] | None,
) -> tuple[Scan, Tensor]:
    vectors = values(require_feed_forward(block).select(torch.tensor(neurons, device=device)))
    vectors = vectors if through is None else through(vectors)
    parts = []
    for part in blocks(len(vectors), _VECTORS):
        hidden = reader.hidden(vectors[part], scale)
        if reader.linear:
            parts.append(reader.scan(hidden, k, max_bytes=max_bytes))
            continue
        ahead, after = (
            reader.scan(reader.hidden(vectors[part] * sign), k, sides=1, max_bytes=max_bytes)
            for sign in (1, -1)
        )
        parts.append(_as_two_sides(ahead, after))
    return Scan.join(parts), vectors.norm(dim=-1)


def _as_two_sides(ahead: Scan, after: Scan) -> Scan:
    """Returns the scans of vectors and of the same times -1 as the two sides of one."""
    names = ("ids", "log_sum", "entropy", "rank")
    both = {name: torch.cat([getattr(s, name) for s in (ahead, after)], dim=1) for name in names}
    # Side 1 of a scan holds logits whose sign is turned when probabilities are read from it.
    ends = torch.cat([ahead.ends, -after.ends], dim=1)
    return Scan(ends=ends, target=ahead.target, **both)


def _scale(view: ModelView, reader: Unembedding, text: Input | None) -> float:
    wanted = reader.projection == "frozen"
    if wanted != (text is not None):
        raise InvalidInput(
            "the scale of the final norm has no source",
            f"projection={reader.projection!r} and text={text!r}"[:200],
            "a text for projection='frozen', and only then",
            "Give a text that is typical of the model's input.",
        )
    norm = view.readout.norm
    if text is None or norm is None:
        return 1.0
    batch = make_batch(view, Given(text))
    name = view.blocks()[-1].resid_out
    trace = view.run(batch, [name], logits=False)
    real = batch.side(view.base_stack(None)).mask.to(view.device)
    return float(norm.scale(trace[name])[real].mean())
