r"""The feed-forward sublayer's parts, built tile by tile and never all at once.

Through the activation, integrated gradients from the zero baseline are exact and closed (Kobayashi
et al. 2024, eq. 12): source ``j`` gets :math:`F_{ij} = (q_{ij} \odot r_i) W_{out}`, where
:math:`q_{ij}` is its share of the pre-activation and :math:`r_i` one secant slope per neuron,
shared by all sources.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import Block, FeedForward
from tl_contextmix.core.folded_weights import Folds
from tl_contextmix.core.frozen_blocks import FrozenFeedForward, freeze_feed_forward
from tl_contextmix.core.neuron_routes import Costs, Route, active_at, fold, in_use, through_some
from tl_contextmix.core.token_sums import (
    FrozenNorm,
    Keep,
    Support,
    TokenSum,
    beside,
    blocks,
    multiply,
    through_neurons,
    within,
)

Bias = Literal["contributor", "fixed"]
Precision = Literal["full", "bfloat16"]
"""What products with value vectors are taken in: the dtype of the maths, or bfloat16."""
DEFAULT_MAX_BYTES = 2**30
_PAIRS_BYTES = 2**27
"""What pairs that go through the weights one by one take at once; more are no faster."""


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
        keep: Returns what folds each read into a branch and keeps it (`Folds`); None where nothing
            is kept.
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
    keep: Callable[[int], Sequence[Keep]] | None = None

    @property
    def sources(self) -> int:
        """Length of the source axis."""
        return self.read.sources

    def folded(self) -> FeedForwardParts:
        """Returns the parts with the input weights folded into what is read."""
        hidden = (
            self.read.map(weight, self.keep(branch) if self.keep else ())
            for branch, weight in enumerate(self.weights)
        )
        return replace(self, hidden=tuple(hidden))

    def stages(
        self, rows: slice, columns: slice, read: slice, way: Way
    ) -> Iterator[Float[Tensor, "batch source target d_model"]]:
        """Yields the parts for a block of rows and sources: mlp_out, resid_post, block_out.

        As far as these go. What is yielded changes once the next is asked for.

        Args:
            rows: Contiguous targets.
            columns: Contiguous sources.
            read: Those of them that the feed-forward sublayer reads.
            way: How they go through the neurons.
        """
        through = {
            "all": self._by_neurons,
            "active": self._by_active_neurons,
            "folded": self._by_matrices,
            "read": self._by_sublayer,
        }
        out = through[way.route](rows, read, way)
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

    def _by_neurons(self, rows: slice, columns: slice, way: Way) -> Tensor:
        out = None
        for part in blocks(self.W_out.shape[0], way.neurons):
            shares, W_out = None, self.W_out[part]
            for token_sum, slope in zip(self.hidden, self.slopes, strict=True):
                share = token_sum.dense(rows, columns, part)
                share *= slope[:, None, rows, part]
                shares = share if shares is None else shares.add_(share)
            assert shares is not None
            found = multiply(shares.transpose(0, 1).to(W_out.dtype), W_out)
            found = found.to(self.bias.dtype).transpose(0, 1)
            out = found if out is None else out.add_(found)
        assert out is not None
        return out

    def _by_active_neurons(self, rows: slice, columns: slice, way: Way) -> Tensor:
        """Returns the same, target by target through its active neurons alone; of one text."""
        read = self.read.dense(rows, columns)[0]
        out = torch.empty_like(read)
        for place, target in enumerate(range(rows.start, rows.stop)):
            some = way.active[target]
            slopes = [slope[0, target, some] for slope in self.slopes]
            out[:, place] = through_some(read[:, place], way.weights, slopes, self.W_out, some)
        return out[None]

    def _by_matrices(self, rows: slice, columns: slice, way: Way) -> Tensor:
        """Returns the same, target by target with its slopes folded into the weights."""
        batch, width = len(self.bias), self.bias.shape[2]
        shape = (columns.stop - columns.start, batch, rows.stop - rows.start, width)
        out = self.bias.new_zeros(shape).transpose(0, 1)
        for row, target in product(range(batch), range(rows.start, rows.stop)):
            for term, (_, span, _) in enumerate(self.read.segments()):
                local = within(columns, span)
                if local.start < local.stop:
                    found = self._through_matrix(term, row, target, local)
                    first = span.start + local.start - columns.start
                    out[row, first : first + len(found), target - rows.start] = found
        return out

    def _through_matrix(
        self, term: int, row: int, target: int, sources: slice
    ) -> Float[Tensor, "source d_model"]:
        """Returns what one target gets from some sources, its slopes folded into the weights."""
        reads = [token_sum.terms[term] for token_sum in self.hidden]
        weights = [read.weight.flatten(0, 1) for read in reads]
        matrix = fold(weights, self.slopes, self.W_out, row, target)
        read = reads[0].before_weights(row, target, sources)
        out = multiply(read.to(matrix.dtype), matrix)
        if term == 0 and sources.start <= target < sources.stop:
            for token_sum, slope in zip(self.hidden, self.slopes, strict=True):
                if token_sum.own is not None:
                    own = token_sum.own[row, target] * slope[row, target]
                    out[target - sources.start] += own.to(out.dtype) @ self.W_out
        return out

    def _by_sublayer(self, rows: slice, columns: slice, way: Way) -> Tensor:
        """Returns the same of what is read, nothing folded."""
        parts, slopes = self.read.dense(rows, columns), [slope[:, rows] for slope in self.slopes]
        if way.support is None:
            sublayer = self.sublayer.part((slice(None), rows))
            return sublayer.transmit(parts.transpose(1, 2), slopes).transpose(1, 2).contiguous()
        source, target = (beside(parts, place) for place in way.support.pairs(rows, columns))
        some, slopes = parts[:, source, target], [slope[:, target] for slope in slopes]
        found = through_neurons(some, self.weights, slopes, self.W_out)
        parts[:, source, target] = found.to(parts.dtype)
        return parts

    def at(self, targets: slice, sources: slice) -> Float[Tensor, "batch target source d_model"]:
        """Returns the parts of some sources at some targets, as one tile.

        Args:
            targets: Contiguous targets.
            sources: Contiguous sources of one attention sublayer.
        """
        pairs, count = sources.stop - sources.start, targets.stop - targets.start
        near = self.hidden and self._costs().route(pairs, len(self.bias) * count) == "all"
        ready = self.ready(sources, hidden=bool(near))
        way = Way("all", self.W_out.shape[0]) if near else Way("read")
        return deque(ready.stages(targets, sources, sources, way), maxlen=1).pop().transpose(1, 2)

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
        return replace(self, read=self.read.of_head(term, head), residual=residual, keep=None)

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

    def tiles(self, max_bytes: int, low: torch.dtype | None = None) -> Iterator[Tile]:
        """Yields all parts, tile by tile: batch rows, targets, sources and `stages`.

        Sources outside the tiles have parts of exactly zero. What the neurons see of a source is
        computed once for all targets.

        Args:
            max_bytes: Workspace.
            low: A dtype to take products with value vectors in; None for that of the maths.
        """
        some = self if low is None else replace(self, W_out=self.W_out.to(low))
        active, rows_in = some._active_neurons(), ()
        if active is None:
            some = some if some._few_pairs() else some.folded()
            plan = _plan(some, max_bytes)
        else:
            plan = _plan_active(some, active, max_bytes)
            rows_in = tuple(weight.T.contiguous() for weight in some.weights)
        target = self.bias.shape[1]
        for rows in blocks(len(self.bias), plan.batch):
            part = some.row(rows)
            read, whole = part.support()
            if active is None:
                ways = part._ways(plan, read)
            else:
                mine = active[rows.start * target : rows.stop * target]
                ways = [(Way("active", active=mine, weights=rows_in), plan.sources, plan.tiles)]
            for way, size, tiles in ways:
                for span in part.stretches(size) if tiles else ():
                    ready = part.ready(span, hidden=way.neurons >= len(self.W_out))
                    for targets in tiles:
                        columns = whole.columns(targets, span)
                        if columns.start < columns.stop:
                            inner = read.columns(targets, columns)
                            yield rows, targets, columns, ready.stages(targets, columns, inner, way)
                    # Or two stretches would be held at once; a generator keeps what it came from.
                    ready = None

    def _ways(self, plan: _Plan, read: Support) -> list[tuple[Way, int, list[slice]]]:
        """Returns how tiles of targets go through the neurons, and how many sources at a time."""
        if not self.hidden:
            way = Way("read", support=None if self.sublayer.routes else read)
            return [(way, plan.sources, plan.tiles)]
        near, long = list[slice](), list[slice]()
        for tile in plan.tiles:
            span, count = read.columns(tile, slice(0, self.sources)), tile.stop - tile.start
            pairs = span.stop - span.start
            times = -(-pairs // plan.fold_sources)
            if self._costs().route(pairs, len(self.bias) * count, times=times) == "all":
                near.append(tile)
                continue
            for part in blocks(count, plan.fold_targets):
                long.append(slice(tile.start + part.start, tile.start + part.stop))
        return [
            (Way("all", plan.neurons), plan.sources, near),
            (Way("folded"), plan.fold_sources, long),
        ]

    def support(self) -> tuple[Support, Support]:
        """Returns where parts of what is read can be other than zero, and where those of all."""
        read, *residual = Support.of(*self._sums)
        return read, read.join(residual[0]) if residual else read

    def _few_pairs(self) -> bool:
        """Whether fewer parts go through the input weights than vectors that are folded into them.

        Folded, their images are then summed over heads for every pair.
        """
        if self.sublayer.routes:
            return False
        batch, target, width = self.bias.shape
        read, _ = self.support()
        pairs = batch * read.count()
        heads = max(term.pattern.shape[1] for term in self.read.terms)
        kept = self.keep is not None
        folds = batch * target + sum(term.folds(kept) for term in self.read.terms)
        return pairs * (width - heads) < folds * width

    @property
    def _sums(self) -> tuple[TokenSum, ...]:
        return (self.read,) if self.residual is None else (self.read, self.residual)

    def _costs(self) -> Costs:
        branches, width = len(self.slopes), self.bias.shape[2]
        mixed = branches * max(term.pattern.shape[1] for term in self.read.terms)
        read = sum(term.value.shape[2] * term.value.shape[3] for term in self.read.terms)
        return Costs(self.W_out.shape[0], width, mixed, branches * width, read)

    def _active_neurons(self) -> list[Tensor] | None:
        """Returns the active neurons of every target, where they are few; None elsewhere."""
        if self.sublayer.routes or not self.sublayer.silent:
            return None
        batch, target, _ = self.bias.shape
        count, costs = batch * target, self._costs()
        if not costs.may_gather(self.sources, count):
            return None
        read, _ = self.support()
        pairs = read.count()
        if not costs.may_gather(pairs // target, count):
            return None
        used = in_use(self.slopes)
        route = costs.route(pairs // target, count, active=int(used.sum()))
        return active_at(used) if route == "active" else None

    def stretches(self, size: int) -> Iterator[slice]:
        """Yields stretches of sources that stay within one attention sublayer's."""
        for _, span, _ in self.read.segments():
            for part in blocks(span.stop - span.start, size):
                yield slice(span.start + part.start, span.start + part.stop)

    def ready(self, sources: slice, *, hidden: bool) -> FeedForwardParts:
        """Returns the parts with the vectors of some sources computed and kept."""
        return replace(
            self,
            read=self.read if self.hidden else self.read.ready(sources),
            hidden=tuple(m.ready(sources) for m in self.hidden) if hidden else self.hidden,
            residual=None if self.residual is None else self.residual.ready(sources),
        )

    def stage_norms(
        self, max_bytes: int, low: torch.dtype | None = None
    ) -> list[Float[Tensor, "batch target source"]]:
        """Returns the norm of every part at each of `stages`, holding no more than a tile.

        Arguments are those of `tiles`. Vectors are rounded in ``low``, their norms are not.
        """
        batch, target, _ = self.bias.shape
        count = 1 + (self.residual is not None) + (self.norm_after is not None)
        result = [self.bias.new_zeros(batch, target, self.sources) for _ in range(count)]
        for rows, targets, columns, stages in self.tiles(max_bytes, low):
            parts = None
            for out, parts in zip(result, stages, strict=True):
                out[rows, targets, columns] = parts.norm(dim=-1).transpose(1, 2)
            del parts
        return result

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
class Way:
    """How a tile goes through the neurons.

    Attributes:
        route: See `neuron_routes`; ``"read"``: as the sublayer itself takes parts of what it reads.
        neurons: How many at a time, where it is through all of them.
        active: The active ones of every target, where it is through these.
        weights: Each branch's input weights then, a row for each neuron.
        support: Where only pairs that read something go through the sublayer; None for all.
    """

    route: Route | Literal["read"]
    neurons: int = 0
    active: Sequence[Tensor] = ()
    weights: Sequence[Float[Tensor, "neuron d_model"]] = ()
    support: Support | None = None


Tile = tuple[slice, slice, slice, Iterator[Tensor]]


@dataclass(frozen=True)
class _Plan:
    batch: int
    tiles: list[slice]
    sources: int
    neurons: int = 0
    fold_targets: int = 1
    fold_sources: int = 1


def _plan(parts: FeedForwardParts, max_bytes: int) -> _Plan:
    """Returns tile sizes that keep the workspace of folded parts within ``max_bytes``.

    What they hold already (folded weights, slopes, the targets' own shares) counts; a
    quarter of the budget is used even where that leaves less. A tile holds one share per branch
    and four vectors of width d_model per pair, and what the neurons and the residual stream see
    of its sources. Sixteen tiles of rows leave 1/32 of a causal map computed for nothing.
    Unfolded, a pair has slopes and vectors of its own, and nothing is computed for nothing.
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
    low = parts.W_out.dtype != parts.bias.dtype
    held += low * parts.W_out.numel() // 2
    share = branches * neuron + low * (neuron + width) // 2
    single = not parts.hidden and not parts.sublayer.routes
    share += single * (neuron + 2 * width)
    budget = max_bytes // parts.bias.element_size()
    room = max(budget - held, budget // 4)
    room = min(room, _PAIRS_BYTES // parts.bias.element_size()) if single else room
    view, pair = branches * heads * neuron + beside, share + vectors
    view = view if parts.hidden else heads * width + beside
    neurons = neuron
    if view + pair > room and parts.hidden:
        neurons = max(1, (room - beside - vectors) // (branches * (heads + 1)))
        view, pair = branches * heads * neurons + beside, branches * neurons + vectors
    targets = target if single else -(-target // 16)
    targets = max(1, min(targets, (room - view) // pair))
    sources = max(1, min(source, room // (view + targets * pair)))
    rows = max(1, min(batch, room // (sources * (view + targets * pair))))
    tiles = [*blocks(target, targets)]
    if not parts.hidden:
        return _Plan(rows, tiles, sources, neurons)
    # Folded, a target holds its matrix, and a pair what it reads before the heads' weights.
    read = parts._costs().read
    alone, pair = read * (2 * neuron + width), read + vectors
    room = max(room - alone, budget // 4)
    fold_sources = max(1, min(source, room // (beside + pair)))
    fold_targets = max(1, min(targets, (room // fold_sources - beside) // pair))
    return _Plan(rows, tiles, sources, neurons, fold_targets, fold_sources)


def _plan_active(parts: FeedForwardParts, active: Sequence[Tensor], max_bytes: int) -> _Plan:
    """Returns the same of parts that go through active neurons, one row of the batch at a time."""
    batch, target, width = parts.bias.shape
    budget = max_bytes // parts.bias.element_size()
    held = sum(map(Tensor.numel, (*parts.slopes, *parts.weights)))
    held += 10 * batch * target * width + sum(map(len, active)) * 2
    room = max(budget - held, budget // 4)
    # What heads read of a source; of a pair, what enters and what comes out of it.
    view = sum(width * max(r.value.shape[2] for r in each.terms) for each in parts._sums)
    targets = max(1, min(-(-target // 16), (room - view) // (6 * width)))
    sources = room // (view + 6 * width * targets + parts.W_out.shape[0])
    return _Plan(1, [*blocks(target, targets)], max(1, min(parts.sources, sources)))


def _placed(parts: Tensor, at: slice, columns: slice) -> Tensor:
    """Returns parts of a stretch of sources as parts of a longer one; those of the rest are 0."""
    batch, _, *rest = parts.shape
    whole = parts.new_zeros(columns.stop - columns.start, batch, *rest).transpose(0, 1)
    whole[:, at.start - columns.start : at.stop - columns.start] = parts
    return whole


def feed_forward_points(
    block: Block,
    points: dict[str, TokenSum],
    bias: Bias,
    max_bytes: int = DEFAULT_MAX_BYTES,
    folds: Folds | None = None,
) -> dict[str, FeedForwardParts]:
    """Returns a block's parts at and after its feed-forward output; they share what they hold.

    Args:
        block: The block.
        points: Its token sums from `decompose.linear_points`.
        bias: The bias convention, see `decompose`.
        max_bytes: Workspace.
        folds: Products of weights that are kept; None for those of this block.
    """
    ff = block.feed_forward
    assert ff is not None
    added = _feed_forward(ff, points["mlp_in"], bias, max_bytes)
    added = replace(added, keep=kept(block, folds))
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


def kept(block: Block, folds: Folds | None = None) -> Callable[[int], Sequence[Keep]] | None:
    """Returns what folds what attention writes into a branch, see `FeedForwardParts.keep`."""
    if block.folds is None or block.parallel:  # parallel: it does not read what attention writes
        return None
    return partial((folds or Folds([block])).keep, block)


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
