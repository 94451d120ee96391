"""Value Zeroing (Mohebbi, Zuidema, Chrupala, Alishahi 2023, EACL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, run_asked
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import IDENTITIES, Block, Trace
from tl_contextmix.core.folded_weights import Folds
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import Norm, blocks
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.core.value_ablation import ablate_values, batch_rows, needed_names
from tl_contextmix.core.words import Spans, merge, require_spans
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, Heads, group_labels, head_groups
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results import ContextMap

# What heads are scaled with and what is added to the stream is known, and held.
_FOLLOWED = IDENTITIES - {"pattern", "z", "unsteered"}
Metric = Literal["cosine", "euclidean"]
SpanRows = Literal["keep", "mean", "max"]


@method(cites=("mohebbi2023quantifying",), compared=True)
def value_zeroing(
    model: object,
    input: Input,
    *,
    heads: Heads = False,
    layer: Layers | None = None,
    spans: Spans | None = None,
    span_rows: SpanRows = "keep",
    metric: Metric = "cosine",
    final_norm: bool = True,
    stack: StackName | None = None,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap:
    r"""Returns how far each block's output moves when one token's value is set to zero.

    .. math:: C_{ij} = d(\tilde x_i^{\neg j}, \tilde x_i)

    (2023, eq. 3), where :math:`\tilde x_i^{\neg j}` is the block's output at ``i`` with the value
    vector of ``j`` zeroed in every head (value bias included), keys, queries and the block's input
    as they were. Exact: equal to a forward pass of the block with ``hook_v`` zeroed at ``j``,
    without one. Where query heads share a value, each head's use of it counts as that head's.
    Layers are independent; multiply them with `ContextMap.rollout` (the residual connection is
    inside, so no identity is added).

    Distances are raw: the paper divides each row by its sum, ``.normalize()``. Cosine distance
    grows with the square of a small change, so compare it with norms by rank, not by value. It is
    computed as half the squared distance of unit vectors: ``1 - cos`` loses every digit in float32.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        heads: False: all heads at once. True: each alone, one map per head. A number or a list of
            numbers: these together. A list of lists: one map per group.
        layer: Layer or layers; None for all.
        spans: Zero these stretches ``(start, stop)`` of source tokens, each as a whole (words).
            A span is labelled with its text and its first token's id.
        span_rows: What becomes of the rows when spans are given: ``"keep"`` one per token;
            ``"mean"`` or ``"max"`` over the rows of each span, for a map of words by words
            (padding omitted).
        metric: ``"cosine"`` distance, or ``"euclidean"``.
        final_norm: Whether the last layer's output is compared after the model's final norm, as
            Hugging Face's hidden states are, or raw.
        stack: ``"cross"`` zeroes encoder values in cross-attention; see `decompose`.
        max_bytes: Workspace, besides the pass and the result.
        **inputs: ``pos``, ``target`` or ``generate`` for some rows (fewer cost less), see `Asked`;
            mask, padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer head target source] of distances.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong, or hooks of your own
            replace what a zeroed value changes.

    Where hooks of your own scale heads at ``hook_z`` or add to the stream, they do so with a value
    zeroed, too; a pass of the model for each of these blocks says whether.

    Cost per layer: ``2 n^2 d_mlp d + 2 n^2 H (d_mlp + d)`` operations (half if causal) and
    ``2 n d_mlp d`` for the sources' view of the neurons; gated: twice all but the first term. The
    first call folds W_O into W_in, ``2 d^2 d_mlp``, which is kept if that of all layers fits into
    256 MiB, and is done at each call otherwise. A loop over zeroed forward passes takes
    ``n^2 (8 d^2 + 4 d d_mlp)`` and more. In a parallel block ``2 n^2 H d``.
    """
    view = as_view(model)
    kind = "cross" if stack == "cross" else "self"
    also = partial(needed_names, kind=kind, spare=inputs.get("cache") is None)
    whole = spans is not None  # stretches of the whole axis
    # A cache does not show what its pass would have done with a value zeroed.
    needs = _FOLLOWED if inputs.get("cache") is None else IDENTITIES
    forward_pass = run_asked(
        view, input, inputs, layer=layer, stack=stack, also=also, needs=needs, whole=whole
    )
    groups = head_groups(forward_pass, heads)
    labels = group_labels(groups)
    rows = None if forward_pass.asked is None else forward_pass.asked.rows
    spans = _require_spans(spans, span_rows, rows, forward_pass)

    rerouted: dict[str, list[int]] = {}
    folds = Folds(forward_pass.blocks)

    def distances(part: Pass, block: Block) -> Tensor:
        part.trace.look_up(part.blocks)
        norm = _final_norm(part, block) if final_norm else None
        zeroed = kind, part.own(rows), groups or [None], spans
        how = _How(*zeroed, metric, norm, max_bytes, folds)
        if block.feed_forward is not None and block.feed_forward.routes:
            before = rerouted.get(str(block.layer), [0, 0])
            pairs = zip(before, how.rerouted(block, part.trace), strict=True)
            rerouted[str(block.layer)] = [sum(pair) for pair in pairs]
        return how.scores(block, part.trace)

    source = "source:attn_out" if spans is None else "span"
    scores = forward_pass.by_block("value_zeroing", f"batch head rows {source}", distances, rows)
    if view.hooked() and inputs.get("cache") is None:
        for block in forward_pass.blocks:
            _require_followed(forward_pass, block, kind)
    options = {
        "heads": list(labels),
        "spans": spans,
        "span_rows": span_rows,
        "metric": metric,
        "final_norm": final_norm,
    }
    if rerouted:
        options |= {"routing": "anew", "rerouted": rerouted}
    target = forward_pass.target
    if rows is not None:
        target = target.select([*range(len(scores))], rows)
    labelled = {"target": target}
    if spans is not None:
        each = [spans] * len(scores)
        source = forward_pass.source("attn_out").join(each)
        if span_rows != "keep":
            scores = merge(scores.transpose(3, 4), each, span_rows, target.mask).transpose(3, 4)
            target = source
        labelled = {"target": target, "source": source}
        real = target.real_pairs(source).to(scores.device)
        scores = scores.masked_fill(~real[:, None, None], 0)
    return forward_pass.map(
        "value_zeroing",
        scores,
        "attn_out",
        f"{metric} distance",
        heads=labels,
        options=options,
        point="block_out",
        **labelled,
    )


@torch.no_grad()
def _require_followed(forward_pass: Pass, block: Block, kind: str) -> None:
    """Checks that hooks do the same in a pass of the model with a value zeroed.

    They do where they scale heads and add to the stream, not where they replace either.
    """
    trace = forward_pass.trace
    read = block.attention(kind)
    scaled = any(one.mixed in trace.changed for one in block.attentions)
    if not scaled and all(trace.edit(one.edits.stream) is None for one in block.sublayers):
        return
    # The source that is read most: of one that nobody reads there is nothing to see.
    place = int(trace.mixing(read).abs().sum(dim=(0, 1, 2)).argmax())

    def zero(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, place] = 0
        return value

    found = forward_pass.rerun([block.resid_out], {read.value: zero})[block.resid_out]
    replay, span = ablate_values(block, trace, kind), [(place, place + 1)]
    expected = trace[block.resid_out].clone()
    for rows, _, changed, _ in replay.tiles(span, DEFAULT_MAX_BYTES):
        expected[:, rows] = changed[:, 0]
    real = forward_pass.target.mask.to(found.device)
    error = float((found - expected)[real].abs().max() / expected[real].abs().max())
    if error <= forward_pass.view.tolerance:
        return
    raise UnsupportedModel(
        f"hooks of your own do something else in layer {block.layer} where a value is zeroed",
        f"a relative error of {error:.2g}, at {', '.join(forward_pass.view.hooked()[:3])}",
        f"at most {forward_pass.view.tolerance:.0e}: hooks that scale heads or add to the "
        "stream, whatever is there",
        "Take off hooks that replace what is there.",
    )


@dataclass(frozen=True)
class _How:
    """What is zeroed in every block, and how outputs are compared."""

    kind: str
    rows: list[int] | None
    groups: Sequence[list[int] | None]
    spans: list[tuple[int, int]] | None
    metric: Metric
    norm: Norm | None
    max_bytes: int
    folds: Folds | None = None

    def scores(self, block: Block, trace: Trace) -> Tensor:
        """Returns distances [batch head target source] of one block."""
        batch = trace.resid_in(block).shape[0]
        if self.rows == []:
            read = block.attention(self.kind)
            sources = trace.values[read.pattern].shape[3]
            return trace.resid_in(block).new_zeros(batch, len(self.groups), 0, sources)
        size = batch_rows(block, trace, self.kind, self.max_bytes)
        parts = [trace] if size >= batch else [trace.part(p) for p in blocks(batch, size)]
        return torch.cat([self._scores(block, part) for part in parts])

    def rerouted(self, block: Block, trace: Trace) -> tuple[int, int]:
        """Returns how many pairs go through other experts, and how many there are."""
        found = ablate_values(block, trace, self.kind, self.rows)
        read = found.read.pattern.shape[0] * int(found.touched(self.spans).sum())
        groups = [found if group is None else found.heads(group) for group in self.groups]
        moved = sum(int(one.rerouted(self.spans, self.max_bytes).sum()) for one in groups)
        return moved, read * len(groups)

    def _scores(self, block: Block, trace: Trace) -> Tensor:
        found = ablate_values(block, trace, self.kind, self.rows)
        found = found.folded(self.spans, len(self.groups), self.max_bytes, folds=self.folds)
        batch, targets, _ = found.before.shape
        sources = found.read.pattern.shape[3] if self.spans is None else len(self.spans)
        out = found.before.new_zeros(batch, len(self.groups), targets, sources)
        for index, group in enumerate(self.groups):
            some = found if group is None else found.heads(group)
            for rows, columns, changed, kept in some.tiles(self.spans, self.max_bytes):
                out[:, index, rows, columns] = self._distance(changed, kept).transpose(1, 2)
        return out

    def _distance(self, changed: Tensor, kept: Tensor) -> Tensor:
        same = (changed == kept).all(dim=-1)
        if self.norm is not None:
            changed, kept = self.norm(changed), self.norm(kept)
        if self.metric == "cosine":
            unit = torch.nn.functional.normalize
            found = (unit(changed, dim=-1) - unit(kept, dim=-1)).square().sum(-1) / 2
        else:
            found = (changed - kept).norm(dim=-1)
        # Sums over tensors of unlike shapes may round differently: equal vectors are at zero.
        return found.masked_fill(same, 0)


def _final_norm(forward_pass: Pass, block: Block) -> Norm | None:
    base = forward_pass.view.base_stack(forward_pass.stack)
    last = block.layer == len(forward_pass.view.stacks[base]) - 1
    return forward_pass.view.final_norms.get(base) if last else None


def _require_spans(
    spans: Spans | None, span_rows: str, rows: list[int] | None, forward_pass: Pass
) -> list[tuple[int, int]] | None:
    merged = span_rows != "keep"
    if merged and (spans is None or rows is not None or forward_pass.stack == "cross"):
        raise InvalidInput(
            "rows cannot be merged",
            f"span_rows={span_rows!r}",
            "spans of the same tokens on both axes, and all targets",
            "Pass spans= without pos=, or leave span_rows out.",
        )
    if spans is None:
        return None
    return require_spans(spans, forward_pass.source("attn_out").ids.shape[1])
