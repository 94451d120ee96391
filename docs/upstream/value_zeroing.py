r"""Value zeroing.

`Value zeroing <https://aclanthology.org/2023.eacl-main.245>`_ (Mohebbi, Zuidema, Chrupala,
Alishahi 2023) asks how much of each token's new representation comes from each other token: the
value vector of one source is set to zero in an attention sublayer, keys and queries as they were,
and the distance by which every target's block output moves is that source's score,

.. math:: C_{ij} = d(\tilde x_i^{\neg j}, \tilde x_i).

Unlike an attention pattern it includes values, the output projection, the residual connection,
normalization and the feed-forward sublayer.

:func:`value_zeroing` is exact and needs one forward pass, not one per source: a zeroed value
changes the sublayer's output by a term that is known, and the rest of the block is recomputed from
it in tiles that fit ``max_bytes``.

Example::

    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.value_zeroing import value_zeroing

    model = TransformerBridge.boot_transformers("gpt2", device="cpu")
    result = value_zeroing(model, "The keys to the cabinet are")
    for label, batch, target, source, score in result.top(5):
        print(f"{label:>6}: position {target} reads {source} ({score:.3f})")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from _block_reading import open_bridge, read_pass, settled
from jaxtyping import Float
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.tools.analysis._model_state import require_int

from tl_contextmix.adapters.norm_reading import final_norms
from tl_contextmix.adapters.reading import block_lists, candidates
from tl_contextmix.core.model_view import StackName
from tl_contextmix.methods.value_zeroing import Metric, _How

_METRICS, _STACK_NAMES = get_args(Metric), get_args(StackName)


@dataclass(frozen=True)
class ValueZeroingResult:
    """Result of :func:`value_zeroing`.

    Attributes:
        scores: Distances, ``[component, batch, target, source]``. Zero where nothing is read and
            at padding.
        labels: Name of each component: ``"L3"`` for all heads of a layer, ``"L3H1"`` for one.
        metric: ``"cosine"`` or ``"euclidean"``.
        stack: Whose attention was zeroed.
        identity_error: Largest relative error of the recomputed block outputs against the model's.
    """

    scores: Float[torch.Tensor, "component batch target source"]
    labels: list[str]
    metric: str
    stack: str
    identity_error: float

    def normalized(self) -> Float[torch.Tensor, "component batch target source"]:
        """Scores with each target's row divided by its sum, as in the paper; empty rows stay 0."""
        total = self.scores.sum(dim=-1, keepdim=True)
        return self.scores / torch.where(total == 0, torch.ones_like(total), total)

    def top(
        self, k: int = 5, *, include_self: bool = False
    ) -> list[tuple[str, int, int, int, float]]:
        """Return the ``k`` highest ``(label, batch, target, source, score)``.

        Args:
            k: How many.
            include_self: Whether a position's own value counts; only other positions otherwise.
        """
        k = require_int(k, "k")
        scores = self.scores
        if not include_self and self.stack != "cross":
            own = torch.eye(*scores.shape[2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(own, -1)
        values, places = scores.flatten().topk(min(k, scores.numel()))
        found = []
        for value, place in zip(values.tolist(), places, strict=True):
            component, batch, target, source = (
                int(index) for index in torch.unravel_index(place, scores.shape)
            )
            if value >= 0:
                found.append((self.labels[component], batch, target, source, value))
        return found

    def to_dataframe(self) -> Any:
        """One row per (component, batch, target, source) as a pandas DataFrame."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.labels, *(range(n) for n in self.scores.shape[1:])],
            names=["component", "batch", "target", "source"],
        )
        values = self.scores.flatten().detach().cpu().numpy()
        return pd.DataFrame({"score": values}, index=index).reset_index()


@torch.no_grad()
def value_zeroing(
    model: Any,
    input: str | list[str] | torch.Tensor | None = None,
    *,
    cache: ActivationCache | None = None,
    attention_mask: torch.Tensor | None = None,
    decoder_input: torch.Tensor | None = None,
    stack: StackName | None = None,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    metric: Metric = "cosine",
    final_norm: bool = True,
    max_bytes: int = 2**30,
) -> ValueZeroingResult:
    """Distance by which each block's output moves when one source's value is zeroed.

    The model is run once with caching unless a ``cache`` is passed. Before anything is returned,
    each block is recomputed from its input, attention patterns, values and weights, and compared
    with the output the model computed; a block that differs is refused by name.

    Args:
        model: A ``TransformerBridge`` in eval mode with attention patterns (eager attention).
        input: A prompt, prompts of the same number of tokens, or token ids ``[batch, pos]``.
            Encoder-decoder bridges take token ids. Optional when ``cache`` is given.
        cache: A cache of a pass, instead of a run.
        attention_mask: 1 at real tokens and 0 at padding, ``[batch, pos]``; of the encoder where
            there are two stacks.
        decoder_input: Decoder token ids ``[batch, pos]`` of an encoder-decoder.
        stack: ``"encoder"`` or ``"decoder"`` self-attention, or ``"cross"``-attention, whose
            sources are encoder positions; ``None`` for the only stack, or the decoder.
        layers: Layers, negative ones from the end; ``None`` for all.
        per_head: Whether each head is zeroed alone (one component per head) or all together.
        metric: ``"cosine"`` distance (computed without cancellation) or ``"euclidean"``.
        final_norm: Whether the last layer is compared after the model's final norm.
        max_bytes: Bound on the workspace beside the pass and the result.

    Returns:
        A :class:`ValueZeroingResult` with ``scores`` ``[component, batch, target, source]``.

    Raises:
        ValueError: If an argument is invalid, neither or an incomplete ``input`` or ``cache`` is
            given, or the model is in training mode.
        NotImplementedError: If the blocks are not attention with values per head and a dense
            elementwise feed-forward sublayer (hybrid, state-space, mixture-of-experts), or are not
            reproduced.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {_METRICS}, got {metric!r}")
    if stack is not None and stack not in _STACK_NAMES:
        raise ValueError(f"stack must be one of {_STACK_NAMES} or None, got {stack!r}")
    max_bytes = require_int(max_bytes, "max_bytes")
    handle, tolerance = open_bridge(model, "value_zeroing")
    lists = block_lists(model, encoder_only=False)
    stack = stack or "decoder"
    if stack != "decoder" and len(lists) == 1:
        raise ValueError(f"stack={stack!r} needs an encoder-decoder; this model has one stack")
    base = "decoder" if stack == "cross" else stack
    kind = "cross" if stack == "cross" else "self"
    prefix, modules = lists[base]
    readings = [
        list(candidates(handle, base, prefix, layer))
        for layer in _layer_numbers(layers, len(modules))
    ]
    trace = read_pass(handle, readings, input, cache, attention_mask, decoder_input)
    norm = final_norms(handle, lists).get(base) if final_norm else None
    scores: list[torch.Tensor] = []
    labels: list[str] = []
    worst = 0.0
    for options in readings:
        block, error = settled(options, trace, tolerance)
        worst = max(worst, error)
        heads = block.attentions[0].W_O.shape[0]
        groups: list[list[int] | None] = [[h] for h in range(heads)] if per_head else [None]
        last = norm if block.layer == len(modules) - 1 else None
        how = _How(kind, None, groups, None, metric, last, max_bytes)
        scores += how.scores(block, trace).unbind(1)
        name = f"L{block.layer}"
        labels += [f"{name}H{head}" for head in range(heads)] if per_head else [name]
    target = trace.batch.side(base).mask
    source = trace.batch.side("encoder" if stack == "cross" else base).mask
    real = (target[:, :, None] & source[:, None, :]).to(handle.device)
    found = torch.stack(scores).masked_fill(~real, 0)
    return ValueZeroingResult(found, labels, metric, stack if len(lists) == 2 else "self", worst)


def _layer_numbers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if len(layers) == 0:
        raise ValueError("layers must name at least one layer")
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise ValueError(f"layers {wrong} are out of range for a stack of {count} layers")
    return [layer % count for layer in layers]
