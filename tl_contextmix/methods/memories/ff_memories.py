"""How memories make up predictions (Geva, Schuster, Berant, Levy 2021, EMNLP, section 5)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs, word_table
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.adapters.questions import Pos, predicting_rows
from tl_contextmix.core.blocks import FeedForward
from tl_contextmix.core.token_sums import beside
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.memory_coefficients import (
    CASES,
    QUADRANTS,
    Active,
    LayerComposition,
    LayerReadout,
    active_rule,
    experts_of,
    quadrants,
    readings,
    require_as_many,
    require_feed_forward,
    require_predicting,
    values,
)
from tl_contextmix.engine.promoted_tokens import promoted, promoted_at
from tl_contextmix.engine.registry import method
from tl_contextmix.results import Memories
from tl_contextmix.results.active_memories import longest

StateProjection = Literal["model", "frozen", "none"]


@method(cites=("geva2021transformer", "geva2022transformer"))
def ff_memories(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    active: Active | None = None,
    projection: StateProjection = "model",
    pos: Pos = -1,
    k: Positive | None = 10,
    **inputs: Unpack[Inputs],
) -> Memories:
    r"""Returns the coefficients of all memories, and how they make up each layer's output.

    With coefficients :math:`m_i`, values :math:`v_i`, the residual stream :math:`r` that the
    feed-forward output :math:`y = \sum_i m_i v_i + b` is added to, the layer's output :math:`o`
    and the top token :math:`\mathrm{top}(x)` of a vector (2021, section 5):

    * active memories: the share with :math:`m_i > 0`;
    * agreement: how many active memories have :math:`\mathrm{top}(v_i) = \mathrm{top}(y)`; zero
      agreement: none has;
    * residual = final: :math:`\mathrm{top}(r^\ell) = \mathrm{top}(o^L)`, and the probability of
      :math:`\mathrm{top}(o^L)` read from :math:`r^\ell`;
    * the case: :math:`\mathrm{top}(o)` is that of :math:`r` alone (residual), of :math:`y` alone
      (ffn), of both (agreement), of neither (composition). Conflict: both have the same top token
      and the sum has another; impossible where logits are linear, possible after a final norm.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers; None for all.
        active: ``"positive"``: memories with a positive coefficient. ``"nonzero"``: those with a
            negative one, too, which promote the token their value demotes most. None:
            ``"nonzero"`` in gated models, whose coefficients have either sign, else
            ``"positive"``.
        projection: How r, y and o are read: ``"model"``: as the model reads its last stream, norm
            and biases included. ``"frozen"``: the final norm's scale held at its real value,
            without biases: logits are linear and there is no conflict. ``"none"``: W_U alone.
            Values are read by W_U with the norm's gain folded in (W_U alone with ``"none"``, the
            whole head of a masked LM).
        pos: Position, several, or ``"all"``, at which it is read what memories promote, for
            `Memories.top`; negative ones count from the last real token.
        k: Of how many memories of each layer, those that add the longest vectors there. None: of
            all memories of the model, once (minutes where it is large).
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        `Memories` [batch layer pos]. In a post-LN block, r is the normed sum in front of the
        feed-forward sublayer and o is after the last norm.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model has no trained vocabulary readout.

    Cost: a forward pass and, per layer, ``6 n d_model d_vocab`` operations, ``2 k d_model d_vocab``
    for each named position, and for agreement ``2 n d_mlp d_model`` and then of most values a few
    hundred logits: of how many depends on the model, which `estimate` takes for a random one.
    ``k=None``: once per model ``2 d_mlp d_model d_vocab`` per layer instead.
    """
    view = as_view(model)
    stack = view.base_stack(None)
    require_predicting(view, stack)
    how = readings(view, projection)
    forward_pass = run_pass(
        view,
        Given(input, **inputs),
        layer=layer,
        also=lambda block: LayerReadout.names(view, block),
        needs=LayerReadout.NEEDS,
        logits=True,
    )
    ffs = [require_feed_forward(block) for block in forward_pass.blocks]
    require_as_many(forward_pass.blocks)
    rule = active_rule(active, ffs[0].gated)
    with torch.no_grad():
        readout = LayerReadout.of(view, forward_pass.trace, how, rule, forward_pass.target.mask)
        found = [
            readout.read(block, forward_pass.trace)
            for block in forward_pass.progress("ff_memories")
        ]
        norms = torch.stack([values(ff).norm(dim=-1) for ff in ffs])
        places = beside(found[0].coefficients, _places(forward_pass, pos))
        named = torch.stack(
            [
                _named(one.coefficients[places], norm, k or 1)
                for one, norm in zip(found, norms, strict=True)
            ]
        )
        if k is None or named.shape[1] >= ffs[0].width:
            tables = torch.stack([promoted(view, block, how[1]) for block in forward_pass.blocks])
        else:
            tables = promoted_at(readout, forward_pass.blocks, found, named)
        agreeing = [readout.agreeing(*both) for both in zip(found, tables, strict=True)]
        if k is not None:
            # A table that was made for another call has more than that.
            known = tables.flatten(1).gather(1, named)
            tables = torch.full_like(tables, -1).flatten(1).scatter(1, named, known)
            tables = tables.view(*norms.shape, 2)
        signs = [_quadrants(ff, forward_pass) for ff in ffs]

    def placed(numbers: Tensor) -> Tensor:
        whole = numbers.new_zeros(*forward_pass.target.mask.shape, *numbers.shape[1:])
        whole[readout.where] = numbers
        return whole

    columns = {
        name: torch.stack([placed(getattr(one, name)) for one in found], dim=1)
        for name in LayerComposition.__dataclass_fields__
    }
    columns["agreeing"] = torch.stack([*map(placed, agreeing)], dim=1)
    final = placed(readout.final)
    tops = [columns[name] for name in ("residual_top", "ffn_top", "output_top")]
    return Memories(
        **columns,
        final_top=final,
        quadrants=torch.stack(signs, dim=1),
        promoted=tables,
        norm=norms,
        layers=forward_pass.layers,
        cases=CASES,
        tokens=forward_pass.target,
        words=word_table(forward_pass.view, *tops, final, tables[tables >= 0]),
        provenance=forward_pass.provenance(
            "ff_memories",
            {
                "active": rule,
                "projection": projection,
                "pos": pos if isinstance(pos, (int, str)) else [*pos],
                "k": k,
            },
        ),
        expert=_experts(ffs),
    )


def _places(forward_pass: Pass, pos: Pos) -> list[int]:
    """Returns positions by their number among those that are read."""
    stack, mask = forward_pass.view.base_stack(None), forward_pass.target.mask
    rows = predicting_rows(forward_pass.view, forward_pass.batch, stack, pos)
    numbers = mask.flatten().cumsum(0).view_as(mask) - 1
    return [int(numbers[row, place]) for row, places in enumerate(rows) for place in places]


def _named(coefficients: Tensor, norm: Tensor, k: int) -> Int[Tensor, " some"]:
    """Returns the memories that add the longest vectors, as numbers of [neuron side]."""
    neurons = longest(coefficients, norm, k)
    return (2 * neurons + (coefficients.gather(1, neurons) < 0)).flatten()


def _experts(ffs: list[FeedForward]) -> Tensor | None:
    """Returns which expert each memory belongs to, -1 in layers without; None without any."""
    each = [experts_of(ff) for ff in ffs]
    if all(one is None for one in each):
        return None
    return torch.stack([torch.full((ffs[0].width,), -1) if one is None else one for one in each])


def _quadrants(ff: FeedForward, forward_pass: Pass) -> Tensor:
    """Returns the share of neurons in each quadrant; no quadrant where there are no gates."""
    post = forward_pass.trace[ff.post]
    if not ff.gated:
        return post.new_zeros(*post.shape[:2], 0)
    found = quadrants(ff, forward_pass.trace)
    return torch.stack([(found == one).to(post).mean(-1) for one in range(len(QUADRANTS))], dim=-1)
