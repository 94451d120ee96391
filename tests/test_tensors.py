"""The algebra against one einsum: every factorised answer equals that of the parts written out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from typing import Literal
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.token_sums import (
    AttentionTerm,
    FrozenNorm,
    Norm,
    Support,
    TokenSum,
    blocks,
    ends_of,
)

pytestmark = pytest.mark.once

BATCH, HEADS, TARGETS, SOURCES, WIDTH, OUT = 2, 3, 4, 5, 2, 7
ALL = slice(0, TARGETS)
Kind = Literal["ln", "rms", "none"]
same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
SLICES = [slice(0, SOURCES), slice(1, 4), slice(2, 3), slice(3, 3)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def read_of(sources: int = SOURCES, heads: int = HEADS, width: int = WIDTH) -> AttentionTerm:
    """A read with zeros in its pattern and scales that are not one."""
    pattern = random(BATCH, heads, TARGETS, sources).softmax(-1)
    pattern[:, :, 0, 1:] = 0
    return AttentionTerm(
        pattern=pattern,
        value=random(BATCH, sources, heads, width),
        weight=random(heads, width, OUT),
        scale=random(BATCH, TARGETS, 1).exp(),
    )


def written_out(read: AttentionTerm) -> Tensor:
    """Every part [batch target source d_out], by the definition in `AttentionTerm`."""
    parts = torch.einsum("bhts,bshd,hdo->btso", read.pattern, read.value, read.weight)
    return parts / read.scale[:, :, None]


def token_sum_of(*reads: AttentionTerm, own: bool) -> TokenSum:
    path = random(BATCH, TARGETS, OUT) if own else None
    constant = random(BATCH, TARGETS, OUT)
    parts = TokenSum(reads, path, constant, lambda: torch.empty(0))
    return replace(parts, sum_up=lambda: parts_of(parts).sum(2) + constant)


def two_reads(*, own: bool = True) -> TokenSum:
    """As at cross-attention: a read of the targets themselves, then one of other tokens."""
    return token_sum_of(read_of(TARGETS), read_of(SOURCES), own=own)


def parts_of(token_sum: TokenSum) -> Tensor:
    """Every part [batch target source d_out]: the reads, side by side, and the target's own."""
    parts = torch.cat([written_out(read) for read in token_sum.terms], dim=2)
    if token_sum.own is not None:
        for token in range(TARGETS):
            parts[:, token, token] += token_sum.own[:, token]
    return parts


# --- Norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_torchs(affine: bool) -> None:
    x, gain, shift = random(3, OUT), random(OUT), random(OUT)
    weights = (gain, shift) if affine else (None, None)
    norm = Norm("ln", *weights, eps=0.3)
    same(norm(x), functional.layer_norm(x, (OUT,), *weights, eps=0.3))


def test_rms_norm_is_torchs() -> None:
    x, gain = random(3, OUT), random(OUT)
    same(Norm("rms", gain, None, 0.3)(x), functional.rms_norm(x, (OUT,), gain, eps=0.3))


def test_no_norm_is_the_identity() -> None:
    x, norm = random(3, OUT), Norm("none", None, None, 0.3)
    assert torch.equal(norm(x), x)
    assert torch.equal(norm.scale(x), torch.ones(3, 1).double())


@pytest.mark.parametrize("kind", ["ln", "rms", "none"])
def test_the_linear_part_of_a_norm_distributes_over_sums(kind: Kind) -> None:
    """``sum(linear(part)) / scale(sum(parts)) + bias == norm(sum(parts))``."""
    shift = random(OUT)
    norm, parts = Norm(kind, random(OUT), shift, 1e-5), random(4, 3, OUT)
    whole = parts.sum(0)
    assert norm.scale(whole).shape == (3, 1)
    same(norm.linear(parts).sum(0) / norm.scale(whole) + shift, norm(whole))


def test_norms_change_dtype_with_what_they_have() -> None:
    norm = Norm("ln", random(OUT), random(OUT), 1e-5).to(torch.float32)
    assert norm.weight.dtype == norm.bias.dtype == torch.float32
    assert Norm("rms", None, None, 1.0).to(torch.float32) == Norm("rms", None, None, 1.0)


# --- AttentionTerm --------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", SLICES, ids=str)
def test_blocks_of_a_read_equal_those_of_its_parts(sources: slice) -> None:
    read, rows = read_of(), slice(1, 4)
    expected = written_out(read)[:, rows, sources].transpose(1, 2)
    # Kept vectors: of all sources, of the asked ones, and of a stretch around them.
    for kept in (read, read.ready(), read.ready(sources), read.ready(slice(1, SOURCES))):
        if sources.start >= kept.first:
            same(kept.dense(rows, sources), expected)
            vectors = torch.einsum("bshd,hdo->bsho", read.value, read.weight)
            same(kept.vectors(sources), vectors[:, sources])
    same(read.columns(slice(2, 5)).dense(rows, sources), expected[..., 2:5])
    same(read.ready().columns(slice(2, 5)).dense(rows, sources), expected[..., 2:5])
    same(read.row(slice(1, 2)).dense(rows, sources), expected[1:])


def test_vectors_are_kept_once_computed_and_only_for_their_stretch() -> None:
    read = read_of()
    whole, some = read.ready(), read.ready(slice(1, 3))
    assert (whole.first, some.first) == (0, 1)
    assert (whole.kept.shape[1], some.kept.shape[1]) == (SOURCES, 2)
    assert whole.vectors().data_ptr() == whole.kept.data_ptr()
    # What was kept before a norm, a matrix or a choice of rows does not hold behind it.
    norm, scale = Norm("ln", random(OUT), None, 1e-5), random(BATCH, TARGETS, 1).exp()
    for changed in (
        whole.linear(FrozenNorm((norm,), scale)),
        whole.map(random(OUT, 3)),
        whole.map(random(OUT, 3), lambda W_O, W_in: random(HEADS, WIDTH, 3)),
        whole.row(slice(0, 1)),
    ):
        assert changed.kept is None
        same(changed.dense(ALL, SLICES[0]).transpose(1, 2), written_out(changed))


def test_the_diagonal_of_a_read_is_what_each_target_gives_itself() -> None:
    read = read_of(TARGETS)
    expected = written_out(read).diagonal(dim1=1, dim2=2).transpose(1, 2)
    same(read.diagonal(), expected)
    same(read.ready().diagonal(), expected)


@pytest.mark.parametrize("kind", ["ln", "rms"])
def test_a_read_after_a_norm(kind: Kind) -> None:
    read, scale = read_of(), random(BATCH, TARGETS, 1).exp()
    norm = Norm(kind, random(OUT), random(OUT), 1e-5)
    expected = norm.linear(written_out(read)) / scale[:, :, None]
    same(written_out(read.linear(FrozenNorm((norm,), scale))), expected)


# Folding costs a product with every dimension of every head, applying one with every vector:
# 2 rows of 5 sources against heads 9, 10 and 11 wide.
@pytest.mark.parametrize(("width", "folds"), [(9, True), (10, True), (11, False)])
def test_a_matrix_is_folded_in_the_cheaper_order(width: int, folds: bool) -> None:
    read, matrix = read_of(width=width), random(OUT, 6)
    mapped = read.map(matrix)
    same(written_out(mapped), written_out(read) @ matrix)
    assert (mapped.value is read.value) == folds
    # Numbers of its own: the folded weight, or the vectors before one shared matrix.
    assert mapped.held == (HEADS * width * 6 if folds else BATCH * SOURCES * HEADS * OUT)


@pytest.mark.parametrize(("width", "used"), [(8 * BATCH * SOURCES, True), (100, False)])
def test_a_fold_that_is_kept_is_used_from_an_eighth_of_the_length(width: int, used: bool) -> None:
    assert 8 * BATCH * SOURCES < 100
    read, fold, matrix = read_of(width=width), random(HEADS, width, 6), random(OUT, 6)
    asked: list[tuple[torch.Tensor, ...]] = []
    mapped = read.map(matrix, lambda *weights: asked.append(weights) or fold)
    assert (mapped.weight is fold) == (mapped.value is read.value) == used
    assert [(one is read.weight, other is matrix) for one, other in asked] == [(True, True)] * used


def test_a_read_through_no_head_brings_nothing_from_the_same_sources() -> None:
    read = read_of().through(slice(0))
    assert torch.equal(read.norms(1), torch.zeros(BATCH, TARGETS, SOURCES).double())
    assert torch.equal(written_out(read), torch.zeros(BATCH, TARGETS, SOURCES, OUT).double())
    assert torch.equal(read.dense(ALL, slice(1, 3)), torch.zeros(BATCH, 2, TARGETS, OUT).double())
    assert read.held == 0


def test_heads_norms_are_those_of_each_heads_parts() -> None:
    read = read_of()
    read.pattern[0, 0] *= -1  # after interventions patterns need not be probabilities
    each = torch.einsum("bhts,bshd,hdo->bhtso", read.pattern, read.value, read.weight)
    same(read.head_norms(), each.norm(dim=-1) / read.scale[:, None])


@pytest.mark.parametrize("max_bytes", [1, 2000, 2**30])
@pytest.mark.parametrize("heads", [1, 3])
def test_norms_of_a_read_equal_those_of_its_parts(max_bytes: int, heads: int) -> None:
    read = read_of(heads=heads)
    same(read.norms(max_bytes), written_out(read).norm(dim=-1))
    assert not bool(read.norms(max_bytes)[:, 0, 1:].any())


@pytest.mark.parametrize("share", [0.0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("sign", [1, -1])
def test_norms_keep_their_digits_where_heads_cancel(share: float, sign: int) -> None:
    """Two heads that differ by a share: the square of their sum loses twice its digits."""
    heads, sources = 2, 600  # more pairs than are recomputed at a time
    pattern = torch.full((BATCH, heads, TARGETS, sources), 0.5).double()
    pattern[:, 1] *= -sign
    value = random(BATCH, sources, 1, WIDTH).expand(-1, -1, heads, -1).clone()
    value[:, :, 1] *= sign * (1 + share)
    weight = random(1, WIDTH, OUT).expand(heads, -1, -1)
    read = AttentionTerm(pattern, value, weight, torch.full((BATCH, TARGETS, 1), 4.0).double())
    exact = (share * value[:, :, 0] @ weight[0]).norm(dim=-1) / 8
    found = read.norms(2**30)
    # What two roundings of the summed vectors leave.
    lengths = (value[:, :, 0] @ weight[0]).norm(dim=-1) / 8
    error = (found - exact[:, None]).abs()
    assert bool((error <= 1e-10 * exact[:, None] + 1e-15 * lengths[:, None]).all())


def test_only_pairs_in_which_heads_cancel_cost_a_second_look() -> None:
    """Multiplications and additions of products: vectors, inner products, squares and bounds."""
    tiny = replace(read_of(), value=random(BATCH, SOURCES, HEADS, WIDTH).abs() * 1e-6)
    read = replace(tiny, weight=tiny.weight.abs())
    once = HEADS * WIDTH * OUT + HEADS**2 * OUT + TARGETS * HEADS**2 + TARGETS * HEADS
    assert count_operations(lambda: read.norms(2**30)) == 2 * BATCH * SOURCES * once
    read.pattern[:] = torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    read.value[:] = read.value[:, :, :1]
    read.weight[:] = read.weight[:1]
    again = TARGETS * HEADS * OUT
    assert count_operations(lambda: read.norms(2**30)) == 2 * BATCH * SOURCES * (once + again)
    # At a twentieth of the heads' lengths ten digits are left, and none is looked at again.
    read.pattern[:] = torch.tensor([1.0, -0.9, 0.0])[:, None, None]
    assert count_operations(lambda: read.norms(2**30)) == 2 * BATCH * SOURCES * once
    read.pattern.zero_()
    assert count_operations(lambda: read.norms(2**30)) == 2 * BATCH * SOURCES * once


def test_as_many_sources_at_a_time_as_the_budget_has_room_for() -> None:
    """Per source three arrays as large as its pattern, its vectors and their inner products."""
    read, seen = read_of(), []
    per_source = 8 * BATCH * (3 * TARGETS * HEADS + HEADS * OUT + HEADS * HEADS)

    def widths(max_bytes: int) -> list[int]:
        seen.clear()
        whole = read._gram_norms
        with mock.patch.object(
            AttentionTerm, "_gram_norms", lambda _, s, all: seen.append(s) or whole(s, all)
        ):
            read.norms(max_bytes)
        return [sources.stop - sources.start for sources in seen]

    assert widths(2 * per_source) == [2, 2, 1]
    assert widths(2 * per_source - 1) == [1] * SOURCES
    assert widths(5 * per_source) == [SOURCES]


# --- TokenSum ------------------------------------------------------------------------------------

SPANS = [
    None,
    slice(0, 9),
    slice(0, 1),
    slice(2, 3),
    slice(3, 4),
    slice(3, 6),
    slice(5, 8),
    slice(4, 9),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("columns", SPANS, ids=str)
def test_blocks_of_a_mixture_equal_those_of_its_parts(columns: slice | None, own: bool) -> None:
    token_sum = two_reads(own=own)
    parts = parts_of(token_sum).transpose(1, 2)
    asked = slice(None) if columns is None else columns
    for found in (token_sum, token_sum.ready(), token_sum.ready(columns)):
        for rows in (ALL, slice(1, 3), slice(3, 4)):
            same(found.dense(rows, columns), parts[:, asked, rows])
            same(found.dense(rows, columns, slice(2, 5)), parts[:, asked, rows, 2:5])


def test_a_block_of_no_sources_is_empty() -> None:
    for token_sum in (two_reads(), token_sum_of(own=False)):
        assert token_sum.dense(slice(1, 3), slice(2, 2)).shape == (BATCH, 0, 2, OUT)
        assert token_sum.dense(ALL, slice(0, 0), slice(1, 3)).shape == (BATCH, 0, TARGETS, 2)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["ln", "rms"])
@pytest.mark.parametrize("shift", [True, False])
def test_a_mixture_after_a_norm_at_its_own_scale(own: bool, kind: Kind, shift: bool) -> None:
    token_sum = two_reads(own=own)
    norm = Norm(kind, random(OUT), random(OUT) if shift else None, 0.1)
    after, scale = token_sum.linear(norm), norm.scale(token_sum.total)
    same(parts_of(after), norm.linear(parts_of(token_sum)) / scale[:, :, None])
    same(after.total, norm(token_sum.total))
    same(parts_of(after).sum(2) + after.bias, after.total)


@pytest.mark.parametrize("own", [True, False])
def test_a_mixture_after_a_matrix_leaves_its_bias_behind(own: bool) -> None:
    token_sum, matrix = two_reads(own=own), random(OUT, 3)
    after = token_sum.map(matrix)
    same(parts_of(after), parts_of(token_sum) @ matrix)
    same(after.total, parts_of(after).sum(2))
    assert torch.equal(after.bias, torch.zeros(BATCH, TARGETS, 3).double())
    assert after.bias.untyped_storage().nbytes() == 8


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, False)])
def test_joined_mixtures_add_up(first: bool, second: bool) -> None:
    one = token_sum_of(read_of(TARGETS), own=first)
    other = token_sum_of(read_of(SOURCES), own=second)
    both = one.join(other)
    same(parts_of(both).sum(2), (parts_of(one).sum(2) + parts_of(other).sum(2)))
    same(both.bias, one.bias + other.bias)
    same(both.total, one.total + other.total)
    assert (both.own is None) == (not first)
    assert both.sources == TARGETS + SOURCES


def test_rows_of_a_mixture() -> None:
    for token_sum in (two_reads(), two_reads(own=False)):
        row = token_sum.row(slice(1, 2))
        assert torch.equal(parts_of(row), parts_of(token_sum)[1:])
        assert torch.equal(row.bias, token_sum.bias[1:])
        assert torch.equal(row.total, token_sum.total[1:])


def test_a_total_is_computed_once_and_only_when_asked() -> None:
    asked = []

    def sum_up() -> Tensor:
        asked.append(1)
        return random(BATCH, TARGETS, OUT)

    token_sum = replace(two_reads(), sum_up=sum_up)
    token_sum.join(two_reads()).map(random(OUT, 3)).row(slice(0, 1))
    assert not asked
    assert torch.equal(token_sum.total, token_sum.total)
    assert len(asked) == 1


def test_what_a_mixture_holds() -> None:
    token_sum = two_reads()
    weights = 2 * HEADS * WIDTH * OUT
    assert token_sum.held == BATCH * TARGETS * OUT + weights
    assert replace(token_sum, own=None).held == weights


def test_only_the_first_read_has_the_targets_own() -> None:
    spans = [slice(0, TARGETS), slice(TARGETS, TARGETS + SOURCES)]
    for own in (True, False):
        found = list(two_reads(own=own).segments())
        assert [span for _, span, _ in found] == spans
        assert [owned for _, _, owned in found] == [own, False]


def test_a_ready_mixture_keeps_each_reads_share_of_the_sources() -> None:
    first, second = two_reads().ready(slice(2, 6)).terms
    assert (first.first, first.kept.shape[1]) == (2, 2)
    assert (second.first, second.kept.shape[1]) == (0, 2)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_norms_of_a_mixture_equal_those_of_its_parts(own: bool, max_bytes: int) -> None:
    token_sum = two_reads(own=own)
    same(token_sum.norms(max_bytes), parts_of(token_sum).norm(dim=-1))
    parts = parts_of(token_sum)[:, :, :TARGETS].diagonal(dim1=1, dim2=2).transpose(1, 2)
    same(token_sum.diagonal(), parts)


def test_vectors_are_kept_where_they_take_a_quarter_of_the_budget() -> None:
    token_sum = two_reads()
    quarter = BATCH * (TARGETS + SOURCES) * HEADS * OUT * 8
    apart = sum(count_operations(lambda r=r: r.norms(4 * quarter)) for r in token_sum.terms)
    # The diagonal from kept vectors is a sum over heads, from values it is over d_head as well.
    diagonal = 2 * BATCH * TARGETS * HEADS * OUT
    for enough in (4 * quarter, 2**30):
        assert count_operations(lambda enough=enough: token_sum.norms(enough)) == apart + diagonal
    assert count_operations(lambda: token_sum.norms(4 * quarter - 1)) == apart + diagonal * WIDTH


# --- Support ------------------------------------------------------------------------------------


def test_support_is_the_stretch_of_sources_with_parts() -> None:
    token_sum = two_reads(own=False)
    for read in token_sum.terms:
        read.pattern.zero_()
    token_sum.terms[0].pattern[1, 2, 1, 2] = 0.5
    token_sum.terms[0].pattern[0, 0, 1, 1] = -0.5
    token_sum.terms[1].pattern[0, 1, 1, 1] = 0.5
    token_sum.terms[1].pattern[0, 1, 3, 4] = 0.5
    # A target that reads nothing has an empty stretch which moves no other's bounds.
    assert Support.of(token_sum) == [Support([9, 1, 9, 8], [0, 6, 0, 9])]
    own = replace(token_sum, own=random(BATCH, TARGETS, OUT))
    assert Support.of(own) == [Support([0, 1, 2, 3], [1, 6, 3, 9])]
    # The same from what was looked up of all layers at once.
    for one in (token_sum, own, own.row(slice(1, 2))):
        spans = [ends_of((read.pattern != 0).any(dim=1)) for read in one.terms]
        pairs = zip(one.terms, spans, strict=True)
        known = replace(one, terms=tuple(replace(read, span=span) for read, span in pairs))
        assert Support.of(known) == Support.of(one)
        # Of no heads there is nothing, and of some what all of them read.
        none = replace(known, own=None, terms=tuple(r.through(slice(0)) for r in known.terms))
        assert Support.of(none) == [Support([9] * TARGETS, [0] * TARGETS)]
        some = replace(known, terms=tuple(read.through(slice(1)) for read in known.terms))
        assert Support.of(some) == Support.of(one)


def test_support_of_some_targets_within_some_sources() -> None:
    support = Support([9, 2, 4], [0, 6, 5])
    assert support.columns(slice(0, 3), slice(0, 9)) == slice(2, 6)
    assert support.columns(slice(2, 3), slice(0, 9)) == slice(4, 5)
    assert support.columns(slice(0, 3), slice(3, 5)) == slice(3, 5)
    assert support.columns(slice(0, 3), slice(7, 9)) == slice(7, 7)
    assert support.columns(slice(0, 1), slice(1, 4)) == slice(9, 9)
    assert support.join(Support([3, 3, 3], [5, 7, 1])) == Support([3, 2, 3], [5, 7, 5])
    for first, last in (([3], [5, 7, 1]), ([3, 3, 3], [5])):
        with pytest.raises(ValueError, match="shorter"):
            support.join(Support(first, last))


def test_nothing_can_be_assigned_to() -> None:
    norm = Norm("ln", None, None, 0.0)
    for thing in (norm, read_of(), two_reads(), Support([0], [1])):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, fields(thing)[0].name, None)


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (4, 2, [(0, 2), (2, 4)]),
        (2, 9, [(0, 2)]),
        (2, 0, [(0, 1), (1, 2)]),
        (2, -3, [(0, 1), (1, 2)]),
        (0, 2, []),
    ],
)
def test_blocks_cover_a_range(length: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(block.start, block.stop) for block in blocks(length, size)] == expected
