"""The highest coefficients of every memory so far: exact, and the same in whatever order they come.

Entries are ordered by value, then by place (document, then position). Their k highest are a
commutative monoid: shards, processes and restarts do not matter. Only positive values count: a
memory that was never active k times has fewer entries, not invented ones.

Where a context counts once, entries have a key and a column keeps the first of each key in that
order: the k highest of distinct keys are a commutative monoid, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.token_sums import beside
from tl_contextmix.methods.memories.corpus_formats import TOKEN_BITS

POSITION_BITS = 20
"""A place is a document's number times 2 ** 20, plus a position."""
_NOWHERE = torch.iinfo(torch.int64).max
Locate = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
# The most bytes of values that are copied to be looked at together.
_TOGETHER = 2**24
# A table of new entries this much wider than k is not worth it: they are sorted instead.
_WIDE = 4
# splitmix64's constants as signed numbers.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


@dataclass
class TopK:
    """The highest values of each column.

    Attributes:
        values: Highest first; -inf where there are fewer.
        places: Where they were.
        tokens: The token there and the one after it, packed.
        hashes: Hashes of their documents.
        keys: Hashes of the contexts, of which each counts once; None where every entry counts.
    """

    values: Float[Tensor, "column k"]
    places: Int[Tensor, "column k"]
    tokens: Int[Tensor, "column k"]
    hashes: Int[Tensor, "column k"]
    keys: Int[Tensor, "column k"] | None = None

    @classmethod
    def zero(
        cls,
        columns: int,
        k: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        distinct: bool = False,
    ) -> TopK:
        """Returns no entries at all; ``distinct`` ones have keys, of which each counts once."""
        return cls(
            torch.full((columns, k), -torch.inf, dtype=dtype, device=device),
            torch.full((columns, k), _NOWHERE, device=device),
            *(torch.full((columns, k), -1, device=device) for _ in range(3 if distinct else 2)),
        )

    def columns(self) -> tuple[Tensor, ...]:
        """Returns what an entry consists of: value, place, tokens, hash and, if it has one, key."""
        found = (self.values, self.places, self.tokens, self.hashes)
        return found if self.keys is None else (*found, self.keys)

    def _part(self, columns: Int[Tensor, " some"]) -> TopK:
        """Returns the state of some columns."""
        return TopK(*(entry[columns] for entry in self.columns()))

    def _take(
        self,
        scores: Float[Tensor, "row column"],
        counted: Bool[Tensor, " row"],
        locate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        repeats: bool,
    ) -> None:
        """Takes in new values of all columns."""
        k = self.values.shape[1]
        limit = self.values[:, -1].clamp(min=_smallest(scores.dtype))
        hit = scores >= limit
        # At the start everything is high enough: the k highest of this batch are all that can stay.
        most = 2 * k * scores.shape[1]
        if not repeats and k < len(scores) and int(hit.count_nonzero()) > most:
            among = scores.masked_fill(~counted[:, None], -torch.inf).T.contiguous()
            kth = among.topk(k, dim=1).values[:, -1]
            hit = (scores >= torch.maximum(limit, kth)) & counted[:, None]
        rows, columns = hit.nonzero(as_tuple=True)
        values = scores[rows, columns]
        # Column by column: entries are sorted faster than the mask is transposed.
        columns, order = columns.sort(stable=True)
        rows, values = rows.index_select(0, order), values.index_select(0, order)
        found = [values, *locate(rows, columns, values)]
        worst, last = (one[:, -1].index_select(0, columns) for one in self.columns()[:2])
        # Of a few entries, not of the whole mask, which takes longer than the comparison.
        better = counted.index_select(0, rows) & ((values > worst) | (found[1] < last))
        if not bool(better.all()):
            some = better.nonzero()[:, 0]  # a mask's size is asked of a GPU at every use
            columns, *found = (entry[some] for entry in (columns, *found))
        self._insert(columns, found)

    def _insert(self, columns: Tensor, new: list[Tensor]) -> None:
        """Takes in entries, those of each column one after the other."""
        if not len(columns):
            return
        k = self.values.shape[1]
        touched, index = columns.unique_consecutive(return_inverse=True)
        at = slice(None) if len(touched) == len(self.values) else touched
        kept = [one[at] for one in self.columns()]
        if self.keys is not None:
            old = torch.arange(len(touched), device=columns.device).repeat_interleave(k)
            index = torch.cat([old, index])
            pairs = zip(kept, new, strict=True)
            new = [torch.cat([some.flatten(), one]) for some, one in pairs]
            order = _ordered(index, new)
            _blank(new, _repeated(index, new[4], order))
            order = _ordered(index, new)
            index, new = index[order], [entry[order] for entry in new]
        rank = _ranks(index, len(touched))
        size = k if self.keys is not None else int(rank.max()) + 1
        if self.keys is None and size > _WIDE * k:
            order, size = _ordered(index, new), k
            new = [entry[order] for entry in new]
        if size == k:
            # Of each column its k best.
            few = (rank < k).nonzero()[:, 0]
            index, rank, new = index[few], rank[few], [entry[few] for entry in new]
        table = TopK.zero(
            len(touched), size, new[0].dtype, index.device, distinct=self.keys is not None
        )
        for column, entry in zip(table.columns(), new, strict=True):
            column[index, rank] = entry
        if self.keys is None:
            table = TopK(*kept).merge(table)
        for column, entry in zip(self.columns(), table.columns(), strict=True):
            column[at] = entry

    def merge(self, other: TopK) -> TopK:
        """Returns the highest values of both."""
        k = self.values.shape[1]
        if self.keys is None:
            pairs = zip(self.columns(), other.columns(), strict=True)
            entries = [torch.cat(pair, dim=1) for pair in pairs]
            order = entries[0].argsort(dim=1, descending=True, stable=True)
            values, places = (entry.gather(1, order) for entry in entries[:2])
            ties = (values[:, 1:] == values[:, :-1]) & (places[:, 1:] < places[:, :-1])
            if bool(ties.any()):
                order = entries[1].argsort(dim=1, stable=True)
                values = entries[0].gather(1, order)
                order = order.gather(1, values.argsort(dim=1, descending=True, stable=True))
            return TopK(*(entry.gather(1, order[:, :k]) for entry in entries))
        both = TopK(*(entry.clone() for entry in self.columns()))
        columns = torch.arange(len(self.values), device=self.values.device).repeat_interleave(k)
        both._insert(columns, [entry.flatten() for entry in other.columns()])
        return both


def _ranks(index: Int[Tensor, " entry"], count: int) -> Int[Tensor, " entry"]:
    """Returns how many entries of its own column come before each, those of a column together."""
    starts = torch.searchsorted(index, torch.arange(count, device=index.device))
    return torch.arange(len(index), device=index.device) - starts.index_select(0, index)


def update_all(
    tops: Sequence[TopK],
    scores: Sequence[Float[Tensor, "row _"]],
    counted: Bool[Tensor, " row"],
    locate: Locate,
    *,
    along: Sequence[Float[Tensor, "row pos _"]] | None = None,
    repeats: bool = False,
) -> None:
    """Takes in new values of several states; columns with nothing high enough cost a comparison.

    The others of all states are treated as columns of one, as far as `_TOGETHER` allows: a GPU is
    waited for as often as for one state.

    Args:
        tops: The states, of one k and one dtype.
        scores: The values of each.
        counted: Which rows count.
        locate: Returns places, tokens, hashes and, where there are any, keys of entries, given
            their rows, columns and values, and ``along`` of these columns.
        along: What the columns of each state have for every position of a row, for ``locate``.
        repeats: Whether several of these rows may have the same key.
    """
    # Later on hardly any column has anything new: one look at each number is all there is.
    live = torch.cat([_live(*pair) for pair in zip(tops, scores, strict=True)]).nonzero()[:, 0]
    if not len(live):
        return
    ends = [0, *accumulate(one.shape[1] for one in scores)]
    cuts = torch.searchsorted(live, beside(live, ends)).tolist()
    wide = 1 if along is None else 1 + along[0].shape[1]
    sizes = [(stop - start) * len(counted) * wide for start, stop in pairwise(cuts)]
    for some in _groups(sizes, _TOGETHER // scores[0].element_size()):
        # Mostly live states are looked at as they are.
        alone = len(some) == 1 and 2 * sizes[some[0]] >= scores[some[0]].numel() * wide
        columns = [None if alone else live[cuts[i] : cuts[i + 1]] - ends[i] for i in some]
        state = _joined([tops[i] for i in some], columns)
        also = None if along is None else _picked([along[i] for i in some], columns)
        state._take(
            _picked([scores[i] for i in some], columns),
            counted,
            lambda rows, where, values, also=also: locate(rows, where, values, also),
            repeats,
        )
        first = 0
        for i, mine in zip(some, columns, strict=True):
            if mine is not None:
                for column, entry in zip(tops[i].columns(), state.columns(), strict=True):
                    column[mine] = entry[first : first + len(mine)]
                first += len(mine)


def _live(top: TopK, scores: Float[Tensor, "row column"]) -> Bool[Tensor, " column"]:
    """Returns the columns that a value may enter, and those with what is no number."""
    limit = top.values[:, -1].clamp(min=_smallest(scores.dtype))
    return ~(scores.amax(dim=0) < limit)


def _groups(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yields places of sizes one after the other, together no more than so much, or one."""
    some, total = list[int](), 0
    for place, size in enumerate(sizes):
        if size and total + size > most and some:
            yield some
            some, total = [], 0
        if size:
            some.append(place)
            total += size
    if some:
        yield some


def _joined(tops: Sequence[TopK], columns: Sequence[Tensor | None]) -> TopK:
    """Returns some columns of states as one; a state of which all are wanted is itself."""
    pairs = zip(tops, columns, strict=True)
    parts = [top if some is None else top._part(some) for top, some in pairs]
    if len(parts) == 1:
        return parts[0]
    return TopK(*map(torch.cat, zip(*(part.columns() for part in parts), strict=True)))


def _picked(tensors: Sequence[Tensor], columns: Sequence[Tensor | None]) -> Tensor:
    """Returns some columns, the last dimension, of tensors side by side."""
    pairs = zip(tensors, columns, strict=True)
    parts = [one if some is None else one[..., some] for one, some in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _ordered(column: Tensor, entries: list[Tensor]) -> Int[Tensor, " entry"]:
    """Returns the order of entries by column, then value, then place."""
    order = entries[1].argsort(stable=True)
    order = order[entries[0][order].argsort(descending=True, stable=True)]
    return order[column[order].argsort(stable=True)]


def _repeated(column: Tensor, keys: Tensor, order: Tensor) -> Int[Tensor, " some"]:
    """Returns the entries whose column has their key earlier in an order."""
    order = order[keys[order].argsort(stable=True)]
    order = order[column[order].argsort(stable=True)]
    later, earlier = order[1:], order[:-1]
    return later[(column[later] == column[earlier]) & (keys[later] == keys[earlier])]


def _blank(entries: list[Tensor], where: Tensor) -> None:
    for entry, nothing in zip(entries, (-torch.inf, _NOWHERE, -1, -1, -1), strict=True):
        entry[where] = nothing


def on_host(tops: Mapping[tuple[int, str], TopK]) -> dict[tuple[int, str], TopK]:
    """Returns states on the host, copied by column: a GPU is not waited for in every layer."""
    columns = [one.columns() for one in tops.values()]
    if not columns or columns[0][0].device.type == "cpu":
        return dict(tops)
    rows = [len(one[0]) for one in columns]
    copied = [torch.cat(column).cpu().split(rows) for column in zip(*columns, strict=True)]
    # Files take no tensors that share memory.
    each = zip(*([part.clone() for part in column] for column in copied), strict=True)
    return {key: TopK(*one) for key, one in zip(tops, each, strict=True)}


def hash_prefixes(ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Returns 64 bits for each prefix, equal for equal prefixes."""
    result, state = torch.empty_like(ids), torch.zeros_like(ids[:, 0])
    for pos in range(ids.shape[1]):
        # A step of splitmix64 for each token; integers wrap.
        state = state * _ODD[0] + ids[:, pos] + 1
        for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
            state = (state ^ (state >> shift)) * factor
        result[:, pos] = state ^ (state >> 31)
    return result


def first_of_each(keys: Int[Tensor, " row"], places: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Returns which rows have the lowest place of all rows with their key."""
    order = places.argsort(stable=True)
    order = order[keys[order].argsort(stable=True)]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[order[1:]] = keys[order[1:]] != keys[order[:-1]]
    return first


def pack_places(documents: Int[Tensor, " batch"], positions: int) -> Int[Tensor, "batch pos"]:
    """Returns the places of the positions of documents."""
    pos = torch.arange(positions, device=documents.device)
    return (documents[:, None] << POSITION_BITS) + pos


def unpack_places(places: Int[Tensor, "*some"]) -> tuple[Tensor, Tensor]:
    """Returns documents and positions."""
    return places >> POSITION_BITS, places & ((1 << POSITION_BITS) - 1)


def pack_tokens(ids: Int[Tensor, "*some"], next_ids: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """Returns two token ids in one number; the second may be -1."""
    return (ids << TOKEN_BITS) + next_ids + 1


def unpack_tokens(tokens: Int[Tensor, "*some"]) -> tuple[Tensor, Tensor]:
    """Returns both token ids."""
    return tokens >> TOKEN_BITS, (tokens & ((1 << TOKEN_BITS) - 1)) - 1


def _smallest(dtype: torch.dtype) -> float:
    """Returns the smallest positive number."""
    zero = torch.zeros((), dtype=dtype)
    return float(torch.nextafter(zero, torch.ones((), dtype=dtype)))
