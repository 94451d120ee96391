"""Value Zeroing (Mohebbi, Zuidema, Chrupala, Alishahi 2023, EACL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input, Pass
from tl_contextmix.adapters.questions import AnswerInputs, run_asked
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import Norm, blocks
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.core.value_ablation import ablate_values, batch_rows, needed_names
from tl_contextmix.core.words import Spans, merge, require_spans
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import bad
from tl_contextmix.results import ContextMap
from tl_contextmix.results.axes import positions, real_pairs

Metric = Literal["cosine", "euclidean"]
SpanRows = Literal["keep", "mean", "max"]
Heads = bool | int | Sequence[int] | Sequence[Sequence[int]]


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
        UnsupportedModel: If the model is one whose numbers would be wrong.

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
    done = run_asked(view, input, inputs, layer=layer, stack=stack, also=also, whole=whole)
    groups, labels = _groups(heads, done, kind)
    rows = None if done.asked is None else done.asked.rows
    spans = _require_spans(spans, span_rows, rows, done)

    def distances(part: Pass, block: Block) -> Tensor:
        norm = _final_norm(part, block) if final_norm else None
        how = _How(kind, part.own(rows), groups, spans, metric, norm, max_bytes)
        return how.scores(block, part.trace)

    source = "source:attn_out" if spans is None else "span"
    scores = done.by_block("value_zeroing", f"batch head rows {source}", distances, rows)
    options = {
        "heads": list(labels),
        "spans": spans,
        "span_rows": span_rows,
        "metric": metric,
        "final_norm": final_norm,
    }
    target = done.target
    if rows is not None:
        target = target.select([*range(len(scores))], rows)
    labelled = {"target": target}
    if spans is not None:
        each = [spans] * len(scores)
        source = done.source("attn_out").join(each)
        if span_rows != "keep":
            scores = merge(scores.transpose(3, 4), each, span_rows, target.mask).transpose(3, 4)
            target = source
        labelled = {"target": target, "source": source}
        real = real_pairs(target.mask, source.mask).to(scores.device)
        scores = scores.masked_fill(~real[:, None, None], 0)
    return done.map(
        "value_zeroing",
        scores,
        "attn_out",
        f"{metric} distance",
        heads=labels,
        options=options,
        point="block_out",
        **labelled,
    )


@dataclass(frozen=True)
class _How:
    """What is zeroed in every block, and how outputs are compared."""

    kind: str
    rows: list[int] | None
    groups: list[list[int] | None]
    spans: list[tuple[int, int]] | None
    metric: Metric
    norm: Norm | None
    max_bytes: int

    def scores(self, block: Block, trace: Trace) -> Tensor:
        """Returns distances [batch head target source] of one block."""
        batch = trace.resid_in(block).shape[0]
        if self.rows == []:
            read = next(one for one in block.attentions if one.kind == self.kind)
            sources = trace.values[read.pattern].shape[3]
            return trace.resid_in(block).new_zeros(batch, len(self.groups), 0, sources)
        size = batch_rows(block, trace, self.kind, self.max_bytes)
        parts = [trace] if size >= batch else [trace.part(p) for p in blocks(batch, size)]
        return torch.cat([self._scores(block, part) for part in parts])

    def _scores(self, block: Block, trace: Trace) -> Tensor:
        found = ablate_values(block, trace, self.kind, self.rows)
        found = found.folded(self.spans, len(self.groups), self.max_bytes)
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


def _final_norm(done: Pass, block: Block) -> Norm | None:
    base = done.view.base_stack(done.stack)
    last = block.layer == len(done.view.stacks[base]) - 1
    return done.view.final_norms.get(base) if last else None


def _groups(heads: Heads, done: Pass, kind: str) -> tuple[list[list[int] | None], tuple[str, ...]]:
    if heads is False:
        return [None], ("all",)
    if heads is None:
        raise bad(
            "no heads were named",
            "None",
            "a truth value, a head, or a list of them",
            "Give heads=False for all of them together, heads=True for each alone.",
        )
    count = next(a for a in done.blocks[0].attentions if a.kind == kind).W_O.shape[0]
    if heads is True:
        return [[head] for head in range(count)], tuple(map(str, range(count)))
    asked: list[Any] = [heads]
    if isinstance(heads, Sequence) and not isinstance(heads, str):
        asked = list(heads) if any(isinstance(head, Sequence) for head in heads) else asked
    groups = [positions("head", group, range(count)) for group in asked]
    for group in groups:
        if len(set(group)) < len(group):
            raise bad(
                "a head cannot be zeroed twice",
                repr(heads),
                "different heads in a group",
                "Name each once.",
            )
    return list(groups), tuple("+".join(map(str, group)) for group in groups)


def _require_spans(
    spans: Spans | None, span_rows: str, rows: list[int] | None, done: Pass
) -> list[tuple[int, int]] | None:
    merged = span_rows != "keep"
    if merged and (spans is None or rows is not None or done.stack == "cross"):
        raise bad(
            "rows cannot be merged",
            f"span_rows={span_rows!r}",
            "spans of the same tokens on both axes, and all targets",
            "Pass spans= without pos=, or leave span_rows out.",
        )
    if spans is None:
        return None
    return require_spans(spans, done.source("attn_out").ids.shape[1])
