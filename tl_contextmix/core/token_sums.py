r"""The algebra every method stands on: sums over source tokens that stay factorised.

Before the feed-forward activation, every tensor on a block's residual path has the form

.. math:: F_{ij} = \frac{1}{s_i} \sum_h A_{hij}\, v_{hj} W_h + \delta_{ij}\, o_i, \qquad
          y_i = \sum_j F_{ij} + b_i

and stays in it under a norm with its scale frozen at the real value, a residual sum and a matrix.
`TokenSum` holds the factors, so norms cost :math:`O(n^2 H^2)` instead of :math:`O(n^2 d)` memory,
and the feed-forward's input projection is folded into `W` once instead of being applied to
:math:`n^2` vectors.

No model, no tokens, no input or output here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, TypeVar

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

T = TypeVar("T", bound="AttentionTerm")
Keep = Callable[[Tensor, Tensor], Tensor]
"""Returns the product of two weights, and keeps it for the next call."""
_KEPT = 8
"""Paid for once, a kept product counts so much less, whichever call is the first."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm, with the linear map that is left when its scale is frozen.

    Attributes:
        kind: ``"ln"`` subtracts the mean, ``"rms"`` does not, ``"none"`` is the identity.
        weight: The gain, or None.
        bias: The bias, or None.
        eps: Added to the mean square.
    """

    kind: Literal["ln", "rms", "none"]
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float

    def centre(self, x: Tensor) -> Tensor:
        """Returns ``x`` less its mean (LayerNorm) or ``x``."""
        return x - x.mean(dim=-1, keepdim=True) if self.kind == "ln" else x

    def scale(self, x: Tensor) -> Tensor:
        """Returns the divisor of this norm at ``x``, the last axis kept with length 1."""
        return self._size(self.centre(x))

    def _size(self, centred: Tensor) -> Tensor:
        if self.kind == "none":
            return torch.ones_like(centred[..., :1])
        return (centred.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def linear(self, x: Tensor) -> Tensor:
        """Returns the part of the norm that distributes over sums, still to be divided by a scale.

        ``sum(linear(part)) / scale(sum(parts)) + bias == norm(sum(parts))`` for any parts.
        """
        x = self.centre(x)
        return x if self.weight is None else x * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the norm of ``x``."""
        x = self.centre(x)
        y = (x if self.weight is None else x * self.weight) / self._size(x)
        return y if self.bias is None else y + self.bias

    def to(self, dtype: torch.dtype) -> Norm:
        """Returns the norm in another dtype."""
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale frozen at the real value, or several passed one after the other.

    It distributes over sums, so what is normed may have further axes of parts.

    Attributes:
        norms: In the order they are passed; none is the identity.
        scale: Product of their scales.
    """

    norms: tuple[Norm, ...]
    scale: Float[Tensor, "*place 1"]

    @classmethod
    def at(cls, norm: Norm | None, whole: Float[Tensor, "*place d_model"]) -> FrozenNorm:
        """Returns a norm frozen at what it really norms; None is the identity."""
        if norm is None:
            return cls((), torch.ones_like(whole[..., :1]))
        return cls((norm,), norm.scale(whole))

    def then(self, later: FrozenNorm) -> FrozenNorm:
        """Returns this one followed by another."""
        return FrozenNorm(self.norms + later.norms, self.scale * later.scale)

    def unscaled(self, x: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Returns the part of it that is the same at all places, still to be divided by `scale`."""
        for norm in self.norms:
            x = norm.linear(x)
        return x

    def linear(self, parts: Float[Tensor, "*some d_model"], axis: int = 1) -> Tensor:
        """Returns parts after it: their sum is that of the whole, less the bias.

        Args:
            parts: Parts at the places of `scale`, with axes of their own.
            axis: Where these axes are.
        """
        if not self.norms:
            return parts
        shape = list(self.scale.shape)
        shape[axis:axis] = [1] * (parts.ndim - len(shape))
        out, scale = self.unscaled(parts), self.scale.view(shape)
        return out / scale if out is parts else out.div_(scale)

    def affine(self, x: Float[Tensor, "*some d_model"], axis: int = 1) -> Tensor:
        """Returns what belongs to no part after it, the last norm's bias included."""
        out = self.linear(x, axis)
        return out if self.bias is None else out + self.bias

    @property
    def bias(self) -> Float[Tensor, " d_model"] | None:
        """What it adds: the last norm's bias, or None."""
        return self.norms[-1].bias if self.norms else None

    def pull_back(self, gradient: Float[Tensor, "*some place d_model"]) -> Tensor:
        """Returns the gradient with respect to what is normed, given that of its output."""
        if not self.norms:
            return gradient
        for norm in reversed(self.norms):
            gradient = norm.centre(gradient if norm.weight is None else gradient * norm.weight)
        return gradient / self.scale

    def part(self, batch: slice = slice(None), place: slice = slice(None)) -> FrozenNorm:
        """Returns the norm at some rows of the batch and some places."""
        return FrozenNorm(self.norms, self.scale[batch, place])


@dataclass(frozen=True)
class AttentionTerm:
    """What one attention sublayer writes: ``sum_h pattern[h,i,j] value[j,h] weight[h] / scale[i]``.

    Attributes:
        pattern: Attention probabilities; exactly 0 where nothing is read.
        value: Value vectors, value bias included.
        weight: What each head does to its values, up to here.
        scale: Product of the frozen norm scales passed so far.
        kept: `vectors` of a stretch of sources, where they are used again and again; else None.
        first: The first source of that stretch.
        span: The first source that each target reads through any head and one past the last, on the
            host, where they were looked up (`Trace.look_up`); None where they were not.
    """

    pattern: Float[Tensor, "batch head target source"]
    value: Float[Tensor, "batch source head d_head"]
    weight: Float[Tensor, "head d_head d_out"]
    scale: Float[Tensor, "batch target 1"]
    kept: Float[Tensor, "batch stretch head d_out"] | None = None
    first: int = 0
    span: Int[Tensor, "2 batch target"] | None = None

    @property
    def held(self) -> int:
        """How many numbers it holds besides those of the model and of the pass."""
        return self.value.numel() if self.shared else self.weight.numel()

    @property
    def shared(self) -> bool:
        """Whether all heads have one matrix, which is not copied for each of them."""
        return len(self.weight) > 0 and self.weight.stride(0) == 0

    def folds(self, kept: bool = False) -> int:
        """Returns how many vectors `map` multiplies with a matrix: sources', or the weights'.

        Args:
            kept: Whether the product is kept for the next call.
        """
        batch, source, head, _ = self.value.shape
        return head * min(batch * source, self._fold_cost(kept))

    def _fold_cost(self, kept: bool) -> int:
        """Returns how many vectors it costs to fold a matrix into the weight of one head."""
        return self.weight.shape[1] // _KEPT if kept else self.weight.shape[1]

    @property
    def per_pair(self) -> int:
        """How many numbers it takes for a pair of target and source, besides the result."""
        return 0

    def vectors(self, sources: slice | None = None) -> Float[Tensor, "batch source head d_out"]:
        """Returns what each source gives through each head at full attention, unscaled."""
        sources = slice(0, self.value.shape[1]) if sources is None else sources
        if self.kept is not None:
            return self.kept[:, sources.start - self.first : sources.stop - self.first]
        value = self.value[:, sources].transpose(0, 1)
        # One matrix of all heads is read once, not for each of them.
        if self.shared:
            found = multiply(value.flatten(0, 2), self.weight[0])
            return found.view(*value.shape[:3], found.shape[1]).transpose(0, 1)
        out = einsum(
            value,
            self.weight,
            "source batch head d_head, head d_head out -> source batch head out",
        )
        return out.transpose(0, 1)

    def dense(self, rows: slice, sources: slice) -> Float[Tensor, "batch source target d_out"]:
        """Returns the sum over heads for a block of rows and sources."""
        pattern = self.pattern[:, :, rows, sources] / self.scale[:, None, rows]
        mixing = rearrange(pattern, "batch head target source -> source batch target head")
        return (mixing @ self.vectors(sources).transpose(0, 1)).transpose(0, 1)

    def before_weights(
        self, batch: int, target: int, sources: slice
    ) -> Float[Tensor, "source read"]:
        """Returns what a target reads of each source before the heads' weights, one after another.

        ``dense`` is its product with ``weight.flatten(0, 1)``.
        """
        pattern = self.pattern[batch, :, target, sources] / self.scale[batch, target]
        return (self.value[batch, sources] * pattern.T[:, :, None]).flatten(1)

    def together(self, rows: slice, sources: slice) -> Float[Tensor, "batch target d_out"]:
        """Returns the sum over heads and sources."""
        mixing = rearrange(
            self.pattern[:, :, rows, sources],
            "batch head target source -> batch target (source head)",
        )
        return mixing @ self.vectors(sources).flatten(1, 2) / self.scale[:, rows]

    def diagonal(self) -> Float[Tensor, "batch target d_out"]:
        """Returns what each target reads from itself."""
        seen = self.pattern.diagonal(dim1=2, dim2=3)
        if self.kept is not None:
            mixing = rearrange(seen, "batch head target -> target batch 1 head")
            out = (mixing @ self.vectors().transpose(0, 1)).transpose(0, 1)
            return out[:, :, 0] / self.scale
        out = einsum(
            self.value * rearrange(seen, "batch head target -> batch target head 1"),
            self.weight,
            "batch target head d_head, head d_head out -> batch target out",
        )
        return out / self.scale

    def linear(self, norm: FrozenNorm) -> AttentionTerm:
        """Returns the term after a norm."""
        weight, scale = norm.unscaled(self.weight), self.scale * norm.scale
        return replace(self, weight=weight, scale=scale, kept=None)

    def map(self, matrix: Float[Tensor, "d_out d_new"], keep: Keep | None = None) -> AttentionTerm:
        """Returns the read after a matrix, folded in the cheaper order.

        Folding the matrix into every head's weight costs d_out^2 d_new products once; applying it
        to the vectors costs ``batch * source * head * d_out * d_new``.

        Args:
            matrix: The matrix.
            keep: Folds it into every head's weight where that is kept for the next call.
        """
        batch, source, head, _ = self.value.shape
        if batch * source < self._fold_cost(keep is not None):
            matrix = matrix.expand(head, *matrix.shape)
            return replace(self, value=self.vectors(), weight=matrix, kept=None)
        weight = self.weight @ matrix if keep is None else keep(self.weight, matrix)
        return replace(self, weight=weight, kept=None)

    def columns(self, part: slice) -> AttentionTerm:
        """Returns the read restricted to some of its output dimensions."""
        kept = None if self.kept is None else self.kept[..., part]
        return replace(self, weight=self.weight[:, :, part], kept=kept)

    def row(self: T, batch: slice, **also: Any) -> T:
        """Returns the read of some rows of the batch; ``also``: fields of a kind of its own."""
        return replace(
            self,
            **also,
            pattern=self.pattern[batch],
            value=self.value[batch],
            scale=self.scale[batch],
            kept=None,
            span=None if self.span is None else self.span[:, batch],
        )

    def ready(self, sources: slice | None = None) -> AttentionTerm:
        """Returns the read with the vectors of some sources (None: all) computed and kept."""
        first = 0 if sources is None else sources.start
        return replace(self, kept=self.vectors(sources), first=first)

    def through(self: T, heads: slice | Sequence[int], **also: Any) -> T:
        """Returns a read of the same sources through some of its heads; none costs nothing."""
        heads = heads if isinstance(heads, slice) else list(heads)
        pattern = self.pattern[:, heads]
        return replace(
            self,
            **also,
            pattern=pattern,
            value=self.value[:, :, heads],
            weight=self.weight[: pattern.shape[1]] if self.shared else self.weight[heads],
            kept=None,
        )

    def head_norms(self) -> Float[Tensor, "batch head target source"]:
        """Returns the norm each head reads from each source: pattern times the value's norm."""
        norms = rearrange(self.vectors().norm(dim=-1), "batch source head -> batch head 1 source")
        return self.pattern.abs() * norms / self.scale[:, None]

    def norms(self, max_bytes: int, *, whole: bool = True) -> Float[Tensor, "batch target source"]:
        r"""Returns the norm of the sum over heads, from inner products between heads.

        :math:`||F_{ij}||^2 = A_{:ij}^T G_j A_{:ij}` with :math:`G_j[h,k] = <u_{hj}, u_{kj}>`.
        Pairs in which the heads nearly cancel are computed directly instead, because the square
        has then lost its digits; without ``whole``, which a GPU waits for, they are NaN.
        """
        batch, head, target, source = self.pattern.shape
        size = self.pattern.element_size()
        per_source = batch * size * (3 * target * head + head * (self.weight.shape[2] + head))
        out = self.pattern.new_empty(batch, target, source)
        for sources in blocks(source, max_bytes // max(per_source, 1)):
            out[:, :, sources] = self._gram_norms(sources, whole)
        return out / self.scale

    def _gram_norms(self, sources: slice, whole: bool) -> Tensor:
        vectors = self.vectors(sources).transpose(0, 1)
        pattern = rearrange(
            self.pattern[..., sources], "batch head target source -> source batch target head"
        )
        gram = vectors @ vectors.transpose(-1, -2)
        square = ((pattern @ gram) * pattern).sum(-1)
        # The square keeps eps / ratio^2 of relative accuracy, ratio being how much of the heads'
        # summed lengths survives their sum. Below eps^(1/5) (0.04 in float32) that is under five
        # digits, and the few pairs concerned are recomputed.
        lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        bound = (pattern.abs() @ lengths[..., None])[..., 0]
        limit = torch.finfo(square.dtype).eps ** 0.2
        weak = (square < (limit * bound) ** 2) & (bound > 0)
        norms = square.clamp(min=0).sqrt()
        if not whole:
            return norms.masked_fill_(weak, torch.nan).permute(1, 2, 0)
        for chunk in weak.nonzero().split(4096):
            j, b, i = chunk.unbind(1)
            direct = einsum(pattern[j, b, i], vectors[j, b], "pair head, pair head out -> pair out")
            norms[j, b, i] = direct.norm(dim=-1)
        return norms.permute(1, 2, 0)


@dataclass(frozen=True)
class TokenSum:
    """A residual-path tensor as parts from source tokens, the target's own path, and a bias.

    Attributes:
        reads: One per attention sublayer passed; the source axis is theirs, one after the other.
        own: What the target position itself contributes besides attention. It belongs to the source
            ``target`` of the first read. None after an attention sublayer alone.
        bias: What belongs to no token.
        sum_up: Computes `total`.
    """

    terms: tuple[AttentionTerm, ...]
    own: Float[Tensor, "batch target d_out"] | None
    bias: Float[Tensor, "batch target d_out"]
    sum_up: Callable[[], Tensor]

    @cached_property
    def total(self) -> Float[Tensor, "batch target d_out"]:
        """What parts and bias add up to; computed when a norm's scale first needs it."""
        return self.sum_up()

    @property
    def sources(self) -> int:
        """Length of the source axis."""
        return sum(read.pattern.shape[3] for read in self.terms)

    def linear(self, norm: Norm) -> TokenSum:
        """Returns the token sum after a norm whose scale is frozen at the real value."""
        return self.frozen(FrozenNorm.at(norm, self.total))

    def frozen(self, norm: FrozenNorm) -> TokenSum:
        """Returns the token sum after a norm that is frozen already."""
        return TokenSum(
            terms=tuple(term.linear(norm) for term in self.terms),
            own=None if self.own is None else norm.linear(self.own),
            bias=norm.affine(self.bias),
            sum_up=lambda: norm.affine(self.total),
        )

    def map(self, matrix: Tensor, keep: Sequence[Keep] = ()) -> TokenSum:
        """Returns the parts after a matrix. The bias stays behind: zeros that take no memory.

        Args:
            matrix: The matrix.
            keep: See `AttentionTerm.map`, for each read (and for more); empty for none.
        """
        nothing = self.bias.new_zeros(()).expand(*self.bias.shape[:2], matrix.shape[1])
        terms = zip(self.terms, keep or repeat(None), strict=False)
        return TokenSum(
            terms=tuple(read.map(matrix, how) for read, how in terms),
            own=None if self.own is None else self.own @ matrix,
            bias=nothing,
            sum_up=lambda: (self.total - self.bias) @ matrix,
        )

    def join(self, other: TokenSum) -> TokenSum:
        """Returns the sum of two token sums that read different things."""
        own = [token_sum.own for token_sum in (self, other) if token_sum.own is not None]
        return TokenSum(
            terms=self.terms + other.terms,
            own=sum(own[1:], own[0]) if own else None,
            bias=self.bias + other.bias,
            sum_up=lambda: self.total + other.total,
        )

    def shifted(self, constant: Float[Tensor, "batch target d_out"] | None) -> TokenSum:
        """Returns the token sum with something added that belongs to no source."""
        if constant is None:
            return self
        sum_up = lambda: self.total + constant  # noqa: E731
        return replace(self, bias=self.bias + constant, sum_up=sum_up)

    def summing_to(self, total: Float[Tensor, "batch target d_out"] | None) -> TokenSum:
        """Returns the token sum with what it adds up to, where that is known already."""
        return self if total is None else replace(self, sum_up=lambda: total)

    def of_head(self, term: int | None, head: int) -> TokenSum:
        """Returns the parts that come through one head of a read; None: through no head (`own`)."""
        terms = tuple(
            read.through(slice(head, head + 1) if place == term else slice(0))
            for place, read in enumerate(self.terms)
        )
        return replace(self, terms=terms, own=self.own if term is None else None)

    def row(self, batch: slice) -> TokenSum:
        """Returns the token sum of some rows of the batch."""
        return TokenSum(
            terms=tuple(read.row(batch) for read in self.terms),
            own=None if self.own is None else self.own[batch],
            bias=self.bias[batch],
            sum_up=lambda: self.total[batch],
        )

    def ready(self, columns: slice | None = None) -> TokenSum:
        """Returns the token sum with the vectors of some sources (None: all) computed and kept."""
        found = []
        for read, span, _ in self.segments():
            local = None if columns is None else within(columns, span)
            found.append(read.ready(local))
        return replace(self, terms=tuple(found))

    @property
    def held(self) -> int:
        """How many numbers it holds besides those of the model and of the pass."""
        own = 0 if self.own is None else self.own.numel()
        return own + sum(read.held for read in self.terms)

    def segments(self) -> Iterator[tuple[AttentionTerm, slice, bool]]:
        """Yields each read, its stretch of the source axis, and whether `own` belongs to it."""
        start = 0
        for index, read in enumerate(self.terms):
            stop = start + read.pattern.shape[3]
            yield read, slice(start, stop), index == 0 and self.own is not None
            start = stop

    def dense(
        self, rows: slice, columns: slice | None = None, neurons: slice | None = None
    ) -> Float[Tensor, "batch source target d_out"]:
        """Returns the parts themselves for a block of rows and sources, the source axis first.

        The source axis leads because each source multiplies its own vectors. In memory it stands
        before the batch axis too, so that a stretch of sources of several rows is one piece and no
        product has to copy it (copies took a quarter of the time at 64 rows of 16 tokens).

        Args:
            rows: Contiguous targets.
            columns: Contiguous sources; None for all.
            neurons: Contiguous output dimensions; None for all.
        """
        columns = slice(0, self.sources) if columns is None else columns
        neurons = slice(0, self.bias.shape[-1]) if neurons is None else neurons
        found = []
        for read, span, owned in self.segments():
            local = within(columns, span)
            if local.start == local.stop:
                continue
            block = read.columns(neurons).dense(rows, local)
            if owned:
                self._add_own(block, rows, local, neurons)
            found.append(block.transpose(0, 1))
        if not found:
            batch, width = self.bias.shape[0], neurons.stop - neurons.start
            return self.bias.new_zeros(batch, 0, rows.stop - rows.start, width)
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.transpose(0, 1)

    def _add_own(self, block: Tensor, rows: slice, columns: slice, neurons: slice) -> None:
        assert self.own is not None
        low, high = max(rows.start, columns.start), min(rows.stop, columns.stop)
        if low < high:
            here = torch.arange(low, high, device=block.device)
            block[:, here - columns.start, here - rows.start] += self.own[:, low:high, neurons]

    def norms(self, max_bytes: int, *, whole: bool = True) -> Float[Tensor, "batch target source"]:
        """Returns the norm of every part, without building the parts; see `AttentionTerm.norms`."""
        size = sum(read.value[..., 0].numel() for read in self.terms) * self.bias.shape[-1]
        fits = size * self.bias.element_size() <= max_bytes // 4
        token_sum = self.ready() if fits else self
        found = []
        for read, _, owned in token_sum.segments():
            norms = read.norms(max_bytes, whole=whole)
            if owned:
                norms.diagonal(dim1=1, dim2=2).copy_(token_sum.diagonal().norm(dim=-1))
            found.append(norms)
        return torch.cat(found, dim=2)

    def diagonal(self) -> Float[Tensor, "batch target d_out"]:
        """Returns what each target gets from itself, through attention and its own path."""
        out = self.terms[0].diagonal()
        return out if self.own is None else out + self.own

    def ends(self) -> Int[Tensor, "2 target"]:
        """Returns the first source that each target reads, and one past the last.

        On the host where all terms have their `span`; of some heads alone it may then be wider.
        """
        known = all(read.span is not None for read in self.terms)
        rows, device = self.bias.shape[1], "cpu" if known else self.bias.device
        first = torch.full((rows,), self.sources, device=device)
        last = torch.zeros_like(first)
        for read, span, owned in self.segments():
            if read.pattern.shape[1]:
                found = read.span if known else ends_of((read.pattern != 0).any(dim=1))
                assert found is not None
                low, high = found[0].amin(dim=0), found[1].amax(dim=0)
                first = first.minimum((low + span.start).masked_fill(high == 0, self.sources))
                last = last.maximum((high + span.start).masked_fill(high == 0, 0))
            if owned:
                own = torch.arange(span.start, span.start + rows, device=device)
                first, last = first.minimum(own), last.maximum(own + 1)
        return torch.stack([first, last])


def ends_of(touched: Bool[Tensor, "*row source"]) -> Int[Tensor, "2 ..."]:
    """Returns the first true place of each row and one past the last; of none the length and 0."""
    length = touched.shape[-1]
    # argmax returns the first of equals.
    first = touched.byte().argmax(dim=-1)
    last = length - touched.byte().flip(-1).argmax(dim=-1)
    nothing = ~touched.any(dim=-1)
    return torch.stack([first.masked_fill(nothing, length), last.masked_fill(nothing, 0)])


@dataclass(frozen=True)
class Support:
    """Where parts can be other than exactly zero.

    Attributes:
        first: For each target the first source it reads.
        last: And one past the last.
    """

    first: list[int]
    last: list[int]

    @classmethod
    def of(cls, *sums: TokenSum) -> list[Support]:
        """Returns which sources each target reads (causal masks, sliding windows, padding).

        Args:
            sums: With as many targets each; one after the other would make a GPU wait for each.
        """
        ends = [one.ends() for one in sums]
        return [cls(*pair) for pair in torch.stack(ends).tolist()]

    def columns(self, rows: slice, within: slice) -> slice:
        """Returns the stretch of sources, within another, that some targets read."""
        low = max(within.start, min(self.first[rows]))
        return slice(low, max(low, min(within.stop, max(self.last[rows]))))

    def count(self) -> int:
        """Returns how many pairs it covers."""
        ends = zip(self.first, self.last, strict=True)
        return sum(max(0, last - first) for first, last in ends)

    def pairs(self, rows: slice, columns: slice) -> tuple[Int[Tensor, " pair"], ...]:
        """Returns the places of sources and of targets in a block that it covers."""
        first, last = (torch.tensor(ends[rows]) for ends in (self.first, self.last))
        place = torch.arange(columns.start, columns.stop)[:, None]
        return ((first <= place) & (place < last)).nonzero(as_tuple=True)

    def join(self, other: Support) -> Support:
        """Returns what either covers."""
        first = [min(pair) for pair in zip(self.first, other.first, strict=True)]
        return Support(first, [max(pair) for pair in zip(self.last, other.last, strict=True)])


def through_neurons(
    parts: Float[Tensor, "*some d_in"],
    weights: Sequence[Float[Tensor, "d_in neuron"]],
    slopes: Sequence[Tensor],
    W_out: Float[Tensor, "neuron d_out"],
) -> Float[Tensor, "*some d_out"]:
    """Returns what parts become by the slopes of each branch's neurons; in the dtype of W_out."""
    shares = None
    for weight, slope in zip(weights, slopes, strict=True):
        share = multiply(parts, weight).mul_(slope)
        shares = share if shares is None else shares.add_(share)
    assert shares is not None
    return multiply(shares.to(W_out.dtype), W_out)


ONEDNN = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
"""oneDNN's product of rows with columns, which are given as rows; None in a PyTorch without it."""
_PLAIN = (Tensor, torch.nn.Parameter)
# Multiplications: fewer are over by the time that oneDNN has begun.
_LARGE = 2**22
# Vectors: for fewer it takes longer to lay out a part of a matrix anew than is saved. What is not
# laid out densely takes oneDNN a thousand times as long.
_MANY = 128


def multiply(
    x: Float[Tensor, "*some d_in"], weight: Float[Tensor, "d_in d_out"]
) -> Float[Tensor, "*some d_out"]:
    """Returns ``x @ weight``, of large matrices in float32 on a CPU by oneDNN.

    It takes half of the time of MKL on AMD's processors, whose AVX-512 MKL does not use.
    """
    large = weight.ndim == 2 and x.numel() * weight.shape[1] >= _LARGE
    single = x.dtype == weight.dtype == torch.float32
    if ONEDNN is None or not (large and single and x.is_cpu and weight.is_cpu):
        return x @ weight
    dense = weight.is_contiguous() or weight.T.is_contiguous()
    followed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = type(x) in _PLAIN and type(weight) in _PLAIN
    if followed or not plain or not (dense or x.numel() >= _MANY * x.shape[-1]):
        return x @ weight
    rows = (weight if dense else weight.contiguous()).T
    return ONEDNN(x.contiguous(), rows, None, "none", [], "")


def within(columns: slice, span: slice) -> slice:
    """Returns a stretch's share of a span, counted from the span's start."""
    low = min(max(columns.start, span.start), span.stop)
    return slice(low - span.start, max(low, min(columns.stop, span.stop)) - span.start)


def beside(like: Tensor | torch.device, numbers: Tensor | Sequence[Any]) -> Tensor:
    """Returns numbers of the host on a device, or a tensor's; nothing waits until they are there.

    What indexes a tensor on a GPU by numbers on the host waits for all that was asked of the GPU
    before, and so does a copy that is not told otherwise. An Apple GPU reads the host's memory when
    it comes to it, and is waited for.
    """
    device = like if isinstance(like, torch.device) else like.device
    if not isinstance(numbers, Tensor):  # of an empty list torch makes fractions
        numbers = torch.as_tensor(numbers or torch.zeros(0, dtype=torch.long))
    # What comes from a GPU has to be there before it is read.
    return numbers.to(device, non_blocking=numbers.is_cpu and device.type != "mps")


def listed(vectors: Sequence[Tensor]) -> list[list[Any]]:
    """Returns the numbers of some vectors, whole or not, copied to the host at once."""
    if not vectors:
        return []
    whole = torch.cat([vector.to(vectors[0].device) for vector in vectors])
    return [part.tolist() for part in whole.cpu().split([len(vector) for vector in vectors])]


def blocks(length: int, size: int) -> Iterator[slice]:
    """Yields consecutive slices that cover ``range(length)``, each of at most ``size``, or 1."""
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
