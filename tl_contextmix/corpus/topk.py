"""The highest coefficients of every memory so far: exact, and the same in whatever order they come.

Entries are ordered by value, then by place (document, then position). Their k highest are a
commutative monoid: shards, processes and restarts do not matter. Only positive values count: a
memory that was never active k times has fewer entries, not invented ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

POSITION_BITS = 20
"""A place is a document's number times 2 ** 20, plus a position."""
_NOWHERE = torch.iinfo(torch.int64).max
_TOKEN_BITS = 31


@dataclass
class TopK:
    """The highest values of each column.

    Attributes:
        values: Highest first; -inf where there are fewer.
        places: Where they were.
        tokens: The token there and the one behind it, packed.
    """

    values: Float[Tensor, "column k"]
    places: Int[Tensor, "column k"]
    tokens: Int[Tensor, "column k"]

    @classmethod
    def zero(cls, columns: int, k: int, dtype: torch.dtype, device: torch.device) -> TopK:
        """Returns no entries at all."""
        return cls(
            torch.full((columns, k), -torch.inf, dtype=dtype, device=device),
            torch.full((columns, k), _NOWHERE, device=device),
            torch.full((columns, k), -1, device=device),
        )

    def update(
        self,
        scores: Float[Tensor, "row column"],
        counted: Bool[Tensor, " row"],
        locate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Takes in new values; columns none of whose values is high enough cost a comparison.

        Args:
            scores: The values.
            counted: Which rows count.
            locate: Returns places and tokens of entries, given their rows, columns and values.
        """
        k = self.values.shape[1]
        worst, last = self.values[:, -1], self.places[:, -1]
        limit = worst.clamp(min=_smallest(scores.dtype))
        hit = (scores >= limit) & counted[:, None]
        # At the start everything is high enough: the k highest of this batch are all that can stay.
        if k < len(scores) and int(hit.sum()) > 2 * k * len(worst):
            kth = scores.masked_fill(~counted[:, None], -torch.inf).topk(k, dim=0).values[-1]
            hit = (scores >= torch.maximum(limit, kth)) & counted[:, None]
        rows, columns = hit.nonzero(as_tuple=True)
        if not len(rows):
            return
        values = scores[rows, columns]
        places, tokens = locate(rows, columns, values)
        better = (values > worst[columns]) | (places < last[columns])
        self._insert(columns[better], values[better], places[better], tokens[better])

    def _insert(self, columns: Tensor, values: Tensor, places: Tensor, tokens: Tensor) -> None:
        if not len(columns):
            return
        k = self.values.shape[1]
        touched, index = columns.unique(return_inverse=True)
        old = torch.arange(len(touched), device=columns.device).repeat_interleave(k)
        index = torch.cat([old, index])
        entries = [
            torch.cat([kept[touched].flatten(), new])
            for kept, new in (
                (self.values, values),
                (self.places, places),
                (self.tokens, tokens),
            )
        ]
        order = entries[1].argsort(stable=True)
        order = order[entries[0][order].argsort(descending=True, stable=True)]
        order = order[index[order].argsort(stable=True)]
        # Each column has its k old entries (some -inf), so that its first k are there.
        starts = torch.searchsorted(index[order], torch.arange(len(touched), device=index.device))
        first = order[starts[:, None] + torch.arange(k, device=index.device)]
        self.values[touched], self.places[touched], self.tokens[touched] = (
            entry[first] for entry in entries
        )

    def merge(self, other: TopK) -> TopK:
        """Returns the highest values of both."""
        k = self.values.shape[1]
        entries = [
            torch.cat([mine, theirs], dim=1)
            for mine, theirs in (
                (self.values, other.values),
                (self.places, other.places),
                (self.tokens, other.tokens),
            )
        ]
        order = entries[0].argsort(dim=1, descending=True, stable=True)
        values, places, _ = found = [entry.gather(1, order) for entry in entries]
        # Equal values are rare and keep the order of the two states: those columns are sorted by
        # place before they are sorted by value, which takes twice the time.
        tied = (values[:, 1:] == values[:, :-1]) & (places[:, 1:] < places[:, :-1])
        some = tied.any(dim=1).nonzero()[:, 0]
        if len(some):
            order = entries[1][some].argsort(dim=1, stable=True)
            again = entries[0][some].gather(1, order)
            order = order.gather(1, again.argsort(dim=1, descending=True, stable=True))
            for entry, whole in zip(found, entries, strict=True):
                entry[some] = whole[some].gather(1, order)
        return TopK(*(entry[:, :k].contiguous() for entry in found))


def pack_places(documents: Int[Tensor, " batch"], positions: int) -> Int[Tensor, "batch pos"]:
    """Returns the places of the positions of documents."""
    pos = torch.arange(positions, device=documents.device)
    return (documents[:, None] << POSITION_BITS) + pos


def unpack_places(places: Int[Tensor, "*some"]) -> tuple[Tensor, Tensor]:
    """Returns documents and positions."""
    return places >> POSITION_BITS, places & ((1 << POSITION_BITS) - 1)


def pack_tokens(ids: Int[Tensor, "*some"], next_ids: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """Returns two token ids in one number; the second may be -1."""
    return (ids << _TOKEN_BITS) + next_ids + 1


def unpack_tokens(tokens: Int[Tensor, "*some"]) -> tuple[Tensor, Tensor]:
    """Returns both token ids."""
    return tokens >> _TOKEN_BITS, (tokens & ((1 << _TOKEN_BITS) - 1)) - 1


def _smallest(dtype: torch.dtype) -> float:
    """Returns the smallest positive number."""
    zero = torch.zeros((), dtype=dtype)
    return float(torch.nextafter(zero, torch.ones((), dtype=dtype)))
