r"""A block's output when one source's value is zeroed in one attention sublayer.

Zeroing value ``j`` changes the sublayer's output at position ``i`` by exactly
:math:`-T_{ij} = -\sum_h A_{hij} v_{hj} W_O^h` and nothing else, so no forward pass is needed: the
term is subtracted, norms are taken anew (their scales are not frozen here) and the feed-forward
sublayer is recomputed. What hooks of the user's own scale heads with, and add to the stream, stays
as it is. Its pre-activation needs no product with the :math:`n^2` changed vectors:

.. math:: z_{ij} = \frac{1}{s^{(2)}_{ij}} \Big(B_i + \frac{R_i - q_{ij}}{s^{(1)}_{ij}}\Big) + c

with :math:`q_{ij}` the term's image under the norms' linear parts and :math:`W_{in}`, folded per
head, and :math:`s^{(1)}, s^{(2)}` the new scales of the norm on the sublayer's output (sandwich,
else 1) and of the norm before the feed-forward sublayer. Folding costs as much as
:math:`\min(nH, d)` such products; where fewer pairs are asked for, the product is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace, shift
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.folded_weights import Branch, Folds, branches
from tl_contextmix.core.later_attention import LaterAttention, added_after
from tl_contextmix.core.token_sums import AttentionTerm, beside, blocks
from tl_contextmix.core.words import Spans


@dataclass(frozen=True)
class ValueAblation:
    """A block and the attention sublayer whose values are zeroed.

    Attributes:
        block: The block.
        attention: The sublayer.
        read: Its terms.
        before: The residual stream it adds to, and what hooks add to their sum.
        raw: Its output, before a norm of it.
        branches: The feed-forward sublayer's branches; empty where it is not changed or is
            recomputed from its input.
        later: Attention sublayers after it.
        fixed: The feed-forward output where it does not see the change (parallel), else None.
        pre: The model's own pre-activations by branch where the pass kept them, else None.
        added: What hooks add to the residual sum after the last sublayer, or None.
        reached: `touched` on the host, by spans, as far as it was asked for.
    """

    block: Block
    attention: AttentionSublayer
    read: AttentionTerm
    before: Float[Tensor, "batch target d_model"]
    raw: Float[Tensor, "batch target d_model"]
    branches: tuple[Branch, ...]
    later: tuple[LaterAttention, ...]
    fixed: Float[Tensor, "batch target d_model"] | None
    pre: tuple[Float[Tensor, "batch target neuron"], ...] | None = None
    added: Float[Tensor, "batch target d_model"] | None = None
    reached: dict[Any, Tensor] = field(default_factory=dict)

    def touched(self, spans: Spans | None) -> Bool[Tensor, "target source"]:
        """Returns which targets read which sources (or spans) in any row of the batch."""
        return _by_span((self.read.pattern != 0).flatten(0, 1).any(dim=0), spans)

    def _reached(self, spans: Spans | None) -> Bool[Tensor, "target source"]:
        """Returns `touched`, or what lies around it, on the host, where it decides what is done."""
        key = None if spans is None else tuple(map(tuple, spans))
        if key not in self.reached:
            if self.read.span is None:
                found = self.touched(spans).cpu()
            else:
                first, last = self.read.span[..., None]
                place = torch.arange(self.read.pattern.shape[3])
                found = _by_span(((place >= first) & (place < last)).any(dim=0), spans)
            self.reached[key] = found
        return self.reached[key]

    def heads(self, group: Sequence[int]) -> ValueAblation:
        """Returns the replay in which only some heads' values are zeroed."""
        found = tuple(replace(branch, read=branch.read.through(group)) for branch in self.branches)
        return replace(self, read=self.read.through(group), branches=found, reached={})

    def folded(
        self,
        spans: Spans | None,
        repeats: int,
        max_bytes: int,
        *,
        folds: Folds | None = None,
    ) -> ValueAblation:
        """Returns the replay with W_in folded into the terms, where that is cheaper and fits.

        Args:
            spans: The spans that are zeroed, or None.
            repeats: How often all pairs are gone through (groups of heads).
            max_bytes: Workspace.
            folds: Products of weights that are kept; None for those of this block.
        """
        ff = self.block.feed_forward
        if ff is None or self.fixed is not None or self.later:
            return self
        if self.attention.norm_after is not None and ff.norm_in is not None:
            return self
        batch, source, heads, _ = self.read.value.shape
        width, size = self.before.shape[2], self.before.element_size()
        # In products of one vector with W_in. A fold that is kept is paid for once; by eighths,
        # as what is done must not depend on whether this is the first call.
        pairs = repeats * batch * int(self._reached(spans).sum())
        fold = min(batch * source * heads, width + batch * source)
        fold = fold if self.block.folds is None else width // 8 + batch * source
        held = len(ff.branches()) * (width + batch * heads) * ff.width * size
        if pairs <= fold or held > max_bytes // 2:
            return self
        of = self.block, ff, self.attention, self.read, self.raw, self.before, self.pre
        found = branches(*of, folds or Folds([self.block]))
        return replace(self, branches=tuple(found))

    def tiles(
        self, spans: Spans | None, max_bytes: int
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields rows, sources (or spans), the block's output without each source, and as it is.

        Pairs outside of all tiles do not change. Neither do those in a tile whose term is zero:
        their output is the kept one, to the last bit.

        Args:
            spans: The spans that are zeroed, or None for each source alone.
            max_bytes: Workspace.
        """
        height, width = _plan(self, spans, max_bytes)
        terms = [self.read, *(branch.read for branch in self.branches)]
        # Which tiles there are is decided on the host, at once.
        touched, alone = self._reached(spans), self._alone(spans)
        lonely = None if alone is None else alone.any(dim=0).cpu()
        # As it is: of as many rows at once as a tile has pairs, not tile by tile.
        parts = [self._output(rows) for rows in blocks(touched.shape[0], height * width)]
        outputs = torch.cat(parts, dim=2)
        for columns in blocks(touched.shape[1], width):
            if not bool(touched[:, columns].any()):
                continue
            reads = [term.ready(_tokens(spans, columns)) for term in terms]
            for rows in blocks(touched.shape[0], height):
                seen = touched[rows, columns].any(dim=0).nonzero()[:, 0].tolist()
                if not seen:
                    continue
                some = slice(columns.start + seen[0], columns.start + seen[-1] + 1)
                whole = alone if lonely is not None and bool(lonely[some, rows].any()) else None
                removed, *images = self._removed(reads, rows, some, spans, whole)
                same = ~removed.any(dim=-1, keepdim=True)
                own, among = outputs[:, :, rows], touched[rows, some].T
                # Products with W_out are what costs: pairs that read nothing are skipped.
                if self.block.feed_forward is None or self.fixed is not None or bool(among.all()):
                    changed = self._output(rows, removed, images)
                else:
                    source, target = (
                        beside(removed, place) for place in among.nonzero(as_tuple=True)
                    )
                    changed = own.expand_as(removed).clone()
                    found = self._output(rows, removed, images, (source, target))
                    changed[:, source, target] = found
                yield rows, some, torch.where(same, own, changed), own

    def rerouted(self, spans: Spans | None, max_bytes: int) -> Bool[Tensor, "batch target source"]:
        """Returns which targets go through other experts without each source (or span).

        Args:
            spans: The spans that are zeroed, or None for each source alone.
            max_bytes: Workspace.
        """
        ff, (height, width) = self.block.feed_forward, _plan(self, spans, max_bytes)
        touched, alone = self.touched(spans), self._alone(spans)
        result = touched.new_zeros(len(self.raw), *touched.shape)
        if not isinstance(ff, Experts) or self.fixed is not None:
            return result
        tiles = [*blocks(touched.shape[0], height)]
        kept = [ff.chosen(self._middle(rows)[0]) for rows in tiles]
        for columns in blocks(touched.shape[1], width):
            read = self.read.ready(_tokens(spans, columns))
            for rows, own in zip(tiles, kept, strict=True):
                (removed,) = self._removed([read], rows, columns, spans, alone)
                chosen = ff.chosen(self._middle(rows, removed)[0])
                result[:, rows, columns] = (chosen != own).any(dim=-1).transpose(1, 2)
        return result

    def _removed(
        self,
        reads: Sequence[AttentionTerm],
        rows: slice,
        columns: slice,
        spans: Spans | None,
        alone: Tensor | None,
    ) -> list[Tensor]:
        """Returns the terms of sources (or spans), and their images, one per branch."""
        result = [_terms(read, rows, columns, spans) for read in reads]
        if alone is None:
            return result
        whole = [self.raw, *(branch.changed for branch in self.branches)]
        return [
            torch.where(alone[:, columns, rows, None], one[:, None, rows], terms)
            for one, terms in zip(whole, result, strict=False)
        ]

    def _alone(self, spans: Spans | None) -> Bool[Tensor, "batch source target"] | None:
        """Returns which sources (or spans) are all that a target reads; None if none are.

        What is left without them is nothing, exactly: a norm of the sublayer's output would make
        something of the rounding of a difference (1e-4 of a score in float32).
        """
        pattern = self.read.pattern
        if self.attention.norm_out is None or self.attention.b_O is not None:
            return None
        if pattern.shape[1] < self.attention.W_O.shape[0]:
            return None  # some heads are left
        seen = (pattern != 0).any(dim=1).long()
        counts = seen
        if spans is not None:
            counts = torch.stack([seen[:, :, a:b].sum(dim=2) for a, b in spans], dim=2)
        alone = (counts > 0) & (counts == seen.sum(dim=2, keepdim=True))
        return alone.transpose(1, 2)

    def _output(
        self,
        rows: slice,
        removed: Tensor | None = None,
        images: list[Tensor] | None = None,
        among: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the block's output [batch source target d_model] with terms zeroed.

        Args:
            rows: The targets.
            removed: The terms; None for the output as it is, with one source.
            images: The terms' images, one per branch. They are used up.
            among: Sources and targets of the pairs to go on with at the feed-forward sublayer; the
                output is then [batch pair d_model]. None: all.
        """
        stream, first, second = self._middle(rows, removed)
        ff = self.block.feed_forward
        source, target = among or (slice(None), slice(None))
        if ff is None:
            return stream
        if self.fixed is not None:
            stream = stream + self.fixed[:, None, rows]
        elif self.branches:
            second = second if ff.norm_in is None else ff.norm_in.scale(stream)
            pre = self._pre(rows, first, second, images)
            if among is not None:
                stream, pre = stream[:, source, target], [x[:, source, target] for x in pre]
            stream = stream + ff.project(ff.post_activation(pre))
        else:
            stream = stream if among is None else stream[:, source, target]
            stream = stream + ff(stream)
        if self.block.ending is not None:
            ending = self.block.ending.part((slice(None), None, rows))
            ending = ending if among is None else ending.part((slice(None), 0, target))
            stream = stream + ending(stream)
        if self.added is not None:
            added = self.added[:, None, rows]
            added = added if among is None else added[:, 0, target]
            stream = stream + added
        last = self.block.feed_forwards[-1]
        return stream if last.norm_after is None else last.norm_after(stream)

    def _middle(
        self, rows: slice, removed: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the stream in front of the feed-forward sublayer, and scales of norms before it.

        Those of the norms on the sublayer's output and on its sum; None where there is none.
        """
        raw = self.raw[:, None, rows]
        raw = raw if removed is None else raw - removed
        attention, first, second = self.attention, None, None
        if attention.norm_out is not None:
            first = attention.norm_out.scale(raw)
            raw = shift(attention.norm_out.linear(raw) / first, attention.norm_out.bias)
        stream = self.before[:, None, rows] + raw
        if attention.norm_after is not None:
            second = attention.norm_after.scale(stream)
            linear = attention.norm_after.linear(stream)
            stream = shift(linear / second, attention.norm_after.bias)
        for later in self.later:
            stream = later.add(stream, rows)
        return stream, first, second

    def _pre(
        self, rows: slice, first: Tensor | None, second: Tensor | None, images: list[Tensor] | None
    ) -> list[Tensor]:
        result = []
        for branch in self.branches:
            changed = branch.changed[:, None, rows]
            # Taken off the caller's list: they are as large as anything there is.
            whole = images.pop(0).neg_().add_(changed) if images else changed.clone()
            if first is not None and branch.base is not None:
                whole = whole.div_(first).add_(branch.base[:, None, rows])
            whole = whole if second is None else whole.div_(second)
            result.append(whole.add_(branch.constant))
        return result


TILE_BYTES = 2**25
"""A tile of pairs and what is made of it; more of them at once are no faster.

Twice that where nothing is folded: every tile then reads all weights (a Llama of d_model 2,048,
n=32: 0.69 s a layer in bfloat16 and 0.74 in float32 instead of 0.92 and 1.04).
"""


def _by_span(touched: Bool[Tensor, "target source"], spans: Spans | None) -> Tensor:
    """Returns which targets read which sources or, where there are any, spans of them."""
    if spans is None:
        return touched
    return torch.stack([touched[:, start:stop].any(dim=1) for start, stop in spans], dim=1)


def needed_names(block: Block, kind: str, spare: bool) -> list[str]:
    """Returns the names of what `replay` needs besides the block's points.

    Args:
        block: The block.
        kind: The attention that changes; the keys of attention after it are needed.
        spare: Whether to name what only spares work, too.
    """
    block.attention(kind)
    kinds: list[str] = [attention.kind for attention in block.attentions]
    keys = [attention.key for attention in block.attentions[kinds.index(kind) + 1 :]]
    ff = block.feed_forward
    return keys if ff is None or not spare else [*keys, *ff.pre_names]


def ablate_values(
    block: Block, trace: Trace, kind: str, rows: Sequence[int] | None = None
) -> ValueAblation:
    """Returns the replay of a block's self- or cross-attention.

    Args:
        block: The block.
        trace: A pass that kept the block's input, patterns and values (and, where another
            attention sublayer follows, that one's keys).
        kind: ``"self"`` or ``"cross"``.
        rows: Targets to look at; None for all.

    Raises:
        UnsupportedModel: If the feed-forward activation is not elementwise.
    """
    picked = slice(None) if rows is None else list(rows)
    where = slice(None), picked
    attention = block.attention(kind)
    if block.ending is not None:
        held = block.ending.followed(trace, where)
        block = replace(block, ending=held)
    kinds: list[str] = [attention.kind for attention in block.attentions]
    position = kinds.index(kind)
    stream = x = trace.resid_in(block)[:, picked]
    for earlier in block.attentions[:position]:
        stream = shift(stream, added_after(earlier, trace, picked))
        stream = earlier.join(stream, earlier.raw_output(trace, where))
    for mixer in block.mixers:  # beside attention: it reads the same, and does not change
        stream = stream + mixer.output(trace, where)
    read = attention.term(trace, picked)
    ff, fixed, pre = block.feed_forward, None, None
    if ff is not None:
        pre = _own_pre(ff, trace, picked)
        fixed = ff(x) if block.parallel else None
    return ValueAblation(
        block=block,
        attention=attention,
        read=read,
        before=shift(stream, added_after(attention, trace, picked)),
        raw=attention.raw_output(trace, where),
        branches=(),
        later=tuple(LaterAttention.of(a, trace, picked) for a in block.attentions[position + 1 :]),
        fixed=fixed,
        pre=pre,
        added=None if ff is None else added_after(block.feed_forwards[-1], trace, picked),
    )


def batch_rows(block: Block, trace: Trace, kind: str, max_bytes: int) -> int:
    """Returns how many rows of the batch to look at together: their sources' view has to fit."""
    attention = block.attention(kind)
    batch, heads, _, source = trace.values[attention.pattern].shape
    ff, width = block.feed_forward, attention.W_O.shape[2]
    neurons = 0 if ff is None else len(ff.branches()) * ff.width
    view = source * heads * (neurons + width) * trace.dtype.itemsize
    return max(1, min(batch, max_bytes // (4 * view)))


def _tokens(spans: Spans | None, columns: slice) -> slice:
    """Returns the stretch of tokens that sources (or spans) lie in."""
    if spans is None:
        return columns
    starts, stops = zip(*spans[columns], strict=True)
    return slice(min(starts), max(stops))


def _terms(read: AttentionTerm, rows: slice, columns: slice, spans: Spans | None) -> Tensor:
    """Returns what sources (or spans) bring to rows [batch source target d_out]."""
    if spans is None:
        return read.dense(rows, columns)
    found = []
    for start, stop in spans[columns]:
        found.append(read.together(rows, slice(start, stop)))
    return torch.stack(found, dim=1)


def _own_pre(ff: FeedForward, trace: Trace, rows: slice | list[int]) -> tuple[Tensor, ...] | None:
    kept = [trace.values.get(name) for name in ff.pre_names]
    # Nothing finer than float32: some hosts norm in float32 whatever the dtype. Nothing coarser: a
    # half-precision model has rounded them.
    if not all(value is not None and value.dtype == trace.dtype == torch.float32 for value in kept):
        return None
    return tuple(trace[name][:, rows] for name in ff.pre_names)


def _plan(found: ValueAblation, spans: Spans | None, max_bytes: int) -> tuple[int, int]:
    """Returns tile sizes that keep the workspace within ``max_bytes``, and tiles in the cache.

    What the sources of a tile give through W_O and W_in is kept over all rows. Sixteen tiles of
    rows leave 1/32 of a causal map's square computed for nothing; finer ones, or fewer than eight
    rows, would read W_out too often.
    """
    batch, targets, width = found.before.shape
    heads = found.read.value.shape[2]
    ff, size = found.block.feed_forward, found.before.element_size()
    neurons = 0 if ff is None or found.fixed is not None else ff.busy
    folded = len(found.branches)
    longest = 1 if spans is None else max(stop - start for start, stop in spans)
    column = longest * batch * heads * (folded * neurons + width) * size
    # Pre-activations, those of the pairs that read something or what the activation makes of
    # them, and one more; vectors before and after.
    pair = (3 + (ff is not None and ff.gated)) * neurons + 11 * width
    ending = found.block.ending
    pair += 0 if ending is None else 3 * ending.width + 2 * width
    pair += found.read.per_pair
    # Queries, scores, their softmax and the mixed values of later attention.
    pair += sum(3 * width + 4 * later.seen.shape[2] * later.seen.shape[3] for later in found.later)
    pair *= batch * size
    # The folded weights, and what every target holds.
    room = max_bytes - folded * width * neurons * size
    room -= batch * targets * (folded * neurons + 4 * width) * size
    room = min(room, TILE_BYTES if folded or ff is None else 2 * TILE_BYTES)
    rows = max(1, min(max(8, -(-targets // 16)), room // pair))
    return rows, max(1, room // (rows * pair + column))
