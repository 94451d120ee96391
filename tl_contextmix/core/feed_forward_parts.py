r"""The feed-forward sublayer's parts, built tile by tile and never all at once.

Through the activation, integrated gradients from the zero baseline are exact and closed (Kobayashi
et al. 2024, eq. 12): source ``j`` gets :math:`F_{ij} = (q_{ij} \odot r_i) W_{out}`, where
:math:`q_{ij}` is its share of the pre-activation and :math:`r_i` one secant slope per neuron,
shared by all sources.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import Block, FeedForward
from tl_contextmix.core.frozen_blocks import FrozenFeedForward, freeze_feed_forward
from tl_contextmix.core.token_sums import FrozenNorm, Support, TokenSum, blocks

Bias = Literal["contributor", "fixed"]
DEFAULT_MAX_BYTES = 2**30
# Of which shares of neurons are made at once: fewer take longer, more take memory for nothing.
_TARGETS = 16


@dataclass(frozen=True)
class FeedForwardParts:
    """What the feed-forward sublayer makes of a token sum; its parts are built block by block.

    Attributes:
        sublayer: The sublayer, with the routing of its experts held.
        read: What the sublayer reads.
        weights: Each branch's input weights; none where experts have their own.
        slopes: For each branch what a share is multiplied with, per neuron.
        W_out: Value vectors; none where experts have their own.
        norm_out: Norm of the output (sandwich).
        residual: What is added, or None.
        norm_after: Norm of the sum (post-LN), or None.
        bias: What belongs to no token, at the end of all this.
        total: What parts and bias add up to.
        hidden: Shares of each branch's pre-activation, once `folded`.
        ending: A third sublayer that reads the sum and adds to it, or None.
    """

    sublayer: FeedForward
    read: TokenSum
    weights: tuple[Float[Tensor, "d_model neuron"], ...]
    slopes: tuple[Float[Tensor, "batch target neuron"], ...]
    W_out: Float[Tensor, "value d_model"]
    norm_out: FrozenNorm
    residual: TokenSum | None
    norm_after: FrozenNorm | None
    bias: Float[Tensor, "batch target d_model"]
    total: Float[Tensor, "batch target d_model"]
    hidden: tuple[TokenSum, ...] = ()
    ending: FrozenFeedForward | None = None

    @property
    def sources(self) -> int:
        """Length of the source axis."""
        return self.read.sources

    def folded(self) -> FeedForwardParts:
        """Returns the parts with the input weights folded into what is read."""
        return replace(self, hidden=tuple(self.read.map(weight) for weight in self.weights))

    def stages(
        self, rows: slice, columns: slice, read: slice, neurons: int
    ) -> Iterator[Float[Tensor, "batch source target d_model"]]:
        """Yields the parts for a block of rows and sources: mlp_out, resid_post, block_out.

        As far as these go. What is yielded changes once the next is asked for.

        Args:
            rows: Contiguous targets.
            columns: Contiguous sources.
            read: Those of them that the feed-forward sublayer reads.
            neurons: How many neurons at a time.
        """
        out = self._through_experts(rows, read) if self.sublayer.routes else None
        for part in blocks(self.W_out.shape[0], neurons):
            out = self._through(rows, read, part, out)
        assert out is not None
        out = out if read == columns else _placed(out, read, columns)
        out = self.norm_out.part(place=rows).linear(out)
        yield out
        if self.residual is not None:
            out += self.residual.dense(rows, columns)
            if self.ending is not None:
                parts = out.transpose(1, 2)
                out = out + self.ending.part(place=rows).adds(parts, False).transpose(1, 2)
            yield out
        if self.norm_after is not None:
            yield self.norm_after.part(place=rows).linear(out)

    def _through(self, rows: slice, columns: slice, part: slice, out: Tensor | None) -> Tensor:
        shares = None
        for token_sum, slope in zip(self.hidden, self.slopes, strict=True):
            share = token_sum.dense(rows, columns, part)
            share *= slope[:, None, rows, part]
            shares = share if shares is None else shares.add_(share)
        assert shares is not None
        product = (shares.transpose(0, 1) @ self.W_out[part]).transpose(0, 1)
        return product if out is None else out.add_(product)

    def _through_experts(self, rows: slice, columns: slice) -> Tensor:
        """Returns the same by expert, without folding: few pairs go through each of them."""
        parts = self.read.dense(rows, columns).transpose(1, 2)
        slopes = [slope[:, rows] for slope in self.slopes]
        sublayer = self.sublayer.part((slice(None), rows))
        return sublayer.transmit(parts, slopes).transpose(1, 2).contiguous()

    def diagonal(self) -> Float[Tensor, "batch target d_model"]:
        """Returns what each target gets from itself, without any other pair."""
        out = self.norm_out.linear(self.sublayer.transmit(self.read.diagonal(), self.slopes))
        if self.residual is not None:
            out = out + self.residual.diagonal()
        if self.ending is not None:
            out = out + self.ending.adds(out[:, :, None], False)[:, :, 0]
        return out if self.norm_after is None else self.norm_after.linear(out)

    def of_head(self, term: int | None, head: int) -> FeedForwardParts:
        """Returns the parts that come through one head, with the slopes of all heads together."""
        residual = None if self.residual is None else self.residual.of_head(term, head)
        return replace(self, read=self.read.of_head(term, head), residual=residual)

    def row(self, batch: slice) -> FeedForwardParts:
        """Returns the parts of some rows of the batch."""
        return replace(
            self,
            sublayer=self.sublayer.part(batch),
            read=self.read.row(batch),
            hidden=tuple(token_sum.row(batch) for token_sum in self.hidden),
            slopes=tuple(slope[batch] for slope in self.slopes),
            norm_out=self.norm_out.part(batch),
            residual=None if self.residual is None else self.residual.row(batch),
            norm_after=None if self.norm_after is None else self.norm_after.part(batch),
            ending=None if self.ending is None else self.ending.part(batch),
            bias=self.bias[batch],
            total=self.total[batch],
        )

    def tiles(self, max_bytes: int) -> Iterator[tuple[slice, slice, slice, Iterator[Tensor]]]:
        """Yields all parts, tile by tile: batch rows, targets, sources and `stages`.

        Sources outside the tiles have parts of exactly zero. What the neurons see of a source is
        computed once for all targets.
        """
        folded = self.folded()
        plan = _plan(folded, max_bytes)
        for rows in blocks(self.bias.shape[0], plan.batch):
            some = folded.row(rows)
            sums = (some.read,) if some.residual is None else (some.read, some.residual)
            read, *residual = Support.of(*sums)
            whole = read.join(residual[0]) if residual else read
            for span in some.stretches(plan.sources):
                ready = some.ready(span, hidden=plan.neurons >= self.W_out.shape[0])
                for targets in blocks(self.bias.shape[1], plan.targets):
                    columns = whole.columns(targets, span)
                    if columns.start < columns.stop:
                        inner = read.columns(targets, columns)
                        stages = ready.stages(targets, columns, inner, plan.neurons)
                        yield rows, targets, columns, stages
                # Or two stretches would be held at once; a generator keeps what it came from.
                ready = stages = None

    def stretches(self, size: int) -> Iterator[slice]:
        """Yields stretches of sources that stay within one attention sublayer's."""
        for _, span, _ in self.read.segments():
            for part in blocks(span.stop - span.start, size):
                yield slice(span.start + part.start, span.start + part.stop)

    def ready(self, sources: slice, *, hidden: bool) -> FeedForwardParts:
        """Returns the parts with the vectors of some sources computed and kept."""
        return replace(
            self,
            hidden=tuple(m.ready(sources) for m in self.hidden) if hidden else self.hidden,
            residual=None if self.residual is None else self.residual.ready(sources),
        )

    def stage_norms(self, max_bytes: int) -> list[Float[Tensor, "batch target source"]]:
        """Returns the norm of every part at each of `stages`, holding no more than a tile."""
        batch, target, _ = self.bias.shape
        count = 1 + (self.residual is not None) + (self.norm_after is not None)
        found = [self.bias.new_zeros(batch, target, self.sources) for _ in range(count)]
        for rows, targets, columns, stages in self.tiles(max_bytes):
            parts = None
            for out, parts in zip(found, stages, strict=True):
                out[rows, targets, columns] = parts.norm(dim=-1).transpose(1, 2)
            del parts
        return found

    def parts(self, max_bytes: int) -> Float[Tensor, "batch target source d_model"]:
        """Returns every part."""
        batch, target, width = self.bias.shape
        out = self.bias.new_zeros(batch, target, self.sources, width)
        for rows, targets, columns, stages in self.tiles(max_bytes):
            last = deque(stages, maxlen=1).pop()
            out[rows, targets, columns] = last.transpose(1, 2)
            del last
        return out


@dataclass(frozen=True)
class _Plan:
    batch: int
    targets: int
    sources: int
    neurons: int


def _plan(parts: FeedForwardParts, max_bytes: int) -> _Plan:
    """Returns tile sizes that keep the workspace of folded parts within ``max_bytes``.

    What they hold already (folded weights, slopes, the targets' own shares) counts; a
    quarter of the budget is used even where that leaves less. A tile holds one share per branch
    and four vectors of width d_model per pair, and what the neurons and the residual stream see
    of its sources. Sixteen tiles of rows leave 1/32 of a causal map computed for nothing.
    """
    batch, target, width = parts.bias.shape
    source, neuron = parts.sources, parts.sublayer.busy
    branches, residual = len(parts.slopes), parts.residual
    heads = max(read.value.shape[2] for read in parts.read.terms)
    beside = 0 if residual is None else width * max(r.value.shape[2] for r in residual.terms)
    vectors = 4 * width + max(read.per_pair for read in parts.read.terms)
    vectors += 0 if parts.ending is None else 2 * width + 2 * parts.ending.sublayer.width
    token_sums = (*parts.hidden, parts.read, *([] if residual is None else [residual]))
    held = sum(m.held for m in token_sums) + sum(slope.numel() for slope in parts.slopes)
    # Vectors per token: the token sums' totals and biases, and the parts'.
    held += 10 * batch * target * width
    budget = max_bytes // parts.bias.element_size()
    room = max(budget - held, budget // 4)
    view, pair = branches * heads * neuron + beside, branches * neuron + vectors
    view = heads * width + beside if parts.sublayer.routes else view
    neurons = neuron
    if view + pair > room and not parts.sublayer.routes:
        neurons = max(1, (room - beside - vectors) // (branches * (heads + 1)))
        view, pair = branches * heads * neurons + beside, branches * neurons + vectors
    targets = max(1, min(-(-target // 16), (room - view) // pair))
    sources = max(1, min(source, room // (view + targets * pair)))
    rows = max(1, min(batch, room // (sources * (view + targets * pair))))
    return _Plan(rows, targets, sources, neurons)


def _placed(parts: Tensor, at: slice, columns: slice) -> Tensor:
    """Returns parts of a stretch of sources as parts of a longer one; those of the rest are 0."""
    batch, _, *rest = parts.shape
    whole = parts.new_zeros(columns.stop - columns.start, batch, *rest).transpose(0, 1)
    whole[:, at.start - columns.start : at.stop - columns.start] = parts
    return whole


def feed_forward_points(
    block: Block, points: dict[str, TokenSum], bias: Bias, max_bytes: int = DEFAULT_MAX_BYTES
) -> dict[str, FeedForwardParts]:
    """Returns a block's parts at and after its feed-forward output; they share what they hold.

    Args:
        block: The block.
        points: Its token sums from `decompose.linear_points`.
        bias: The bias convention, see `decompose`.
        max_bytes: Workspace.
    """
    ff = block.feed_forward
    assert ff is not None
    added = _feed_forward(ff, points["mlp_in"], bias, max_bytes)
    stream = points["residual"]
    total, parts_bias = added.total + stream.total, added.bias + stream.bias
    ending = None
    if block.ending is not None:
        ending = freeze_feed_forward(block.ending, total, total, parts_bias, bias == "fixed")
        parts_bias = parts_bias + ending.adds(parts_bias[:, :, None], True)[:, :, 0]
        total = total + block.ending(total)
    summed = replace(added, residual=stream, bias=parts_bias, total=total, ending=ending)
    normed, last = summed, block.feed_forwards[-1].norm_after
    if last is not None:
        norm = FrozenNorm.at(last, total)
        normed = replace(summed, norm_after=norm, bias=norm.affine(parts_bias), total=last(total))
    return {"mlp_out": added, "resid_post": summed, "block_out": normed}


def neuron_shares(
    ff: FeedForward,
    read: TokenSum,
    convention: Bias,
    rows: Sequence[int],
    neurons: Int[Tensor, " neuron"],
    shares: Float[Tensor, "batch target source neuron"],
) -> Float[Tensor, "batch target neuron"]:
    """Writes each source's share of some neurons' activations; returns the share of no source.

    Args:
        ff: The feed-forward sublayer.
        read: What it reads, from `decompose.linear_points`.
        convention: The bias convention, see `decompose`.
        rows: The targets.
        neurons: The neurons.
        shares: Where the shares are written: they are many, and made a few targets at a time.
    """
    some = ff.holding(read.total).select(neurons)
    start, end = (some.pre_activations(x) for x in (read.bias, read.total))
    slopes, rest = some.linearise(start, end, convention == "fixed")
    hidden = [read.map(weight).ready() for weight, _ in some.branches()]
    # Tiles are contiguous: of all targets a few at a time, of others one each.
    whole = list(rows) == list(range(read.bias.shape[1]))
    branched = list(zip(hidden, slopes, strict=True))
    for places in blocks(len(rows), _TARGETS if whole else 1):
        tile = places if whole else slice(rows[places.start], rows[places.start] + 1)
        parts = (token_sum.dense(tile) * slope[:, None, tile] for token_sum, slope in branched)
        shares[:, places] = reduce(add, parts).transpose(1, 2)
    return rest[:, list(rows)]


def _feed_forward(
    ff: FeedForward, read: TokenSum, convention: Bias, max_bytes: int
) -> FeedForwardParts:
    ff, branches, W_out = ff.holding(read.total), (), read.bias[0, :0]
    if not ff.routes:
        branches, W_out = ff.branches(), ff.W_out
    shape = read.bias.shape[:2]
    flat = ff if ff.gain is None else replace(ff, gain=ff.gain.flatten(0, 1))
    slopes = tuple(read.bias.new_empty(*shape, ff.width) for _ in range(1 + ff.gated))
    # Not like what is read, whose axes may lie in another order in memory: flat views are written.
    bias, total = (read.bias.new_empty(read.bias.shape) for _ in range(2))
    # Some tokens at a time: slopes take a dozen tensors of their own size on the way.
    size = 16 * len(slopes) * ff.width * bias.element_size()
    for rows in blocks(shape.numel(), max(16, max_bytes // 4 // size)):
        begun, ended = (x.flatten(0, 1)[rows] for x in (read.bias, read.total))
        held = flat.part(rows)
        start, end, constant = *map(held.pre_activations, (begun, ended)), held.constant()
        pieces, rest = held.linearise(start, end, convention == "fixed")
        for slope, piece in zip(slopes, pieces, strict=True):
            slope.flatten(0, 1)[rows] = piece
        bias.flatten(0, 1)[rows] = held.write(rest) + constant
        total.flatten(0, 1)[rows] = held.write(held.activate(end)) + constant
    norm_out = FrozenNorm.at(ff.norm_out, total)
    bias = norm_out.affine(bias)
    total = total if ff.norm_out is None else ff.norm_out(total)
    return FeedForwardParts(
        sublayer=ff,
        read=read,
        weights=tuple(weight for weight, _ in branches),
        slopes=slopes,
        W_out=W_out,
        norm_out=norm_out,
        residual=None,
        norm_after=None,
        bias=bias,
        total=total,
    )
