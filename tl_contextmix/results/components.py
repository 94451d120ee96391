"""Components of the residual stream as columns of a table, one row of columns per sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Int, Num

from tl_contextmix.core.validation import require_shape
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import storage

_WRITERS = ("attn", "cross_attn", "mlp")
_ENCODER = ("encoder attn", "encoder mlp")
_SUBLAYER_BIASES = tuple(f"{name} bias" for name in (*_WRITERS, *_ENCODER))
STEERING = tuple(
    f"{place} steering" for place in ("resid_pre", "resid_mid", "resid_mid_cross", "resid_post")
)
"""What hooks of the user's own add to the residual stream, by where."""
_POINTS = ("mlp", "resid_pre", "resid_mid", "resid_mid_cross", "resid_post")
FEATURES = tuple(f"{point} feature" for point in _POINTS)
"""Features of a dictionary, by where it stands."""
ERRORS = tuple(f"{point} error" for point in _POINTS)
"""What they miss."""
_BIASES = (*_SUBLAYER_BIASES, *(f"{name} bias" for name in FEATURES))
# In the order of files: what is new comes last.
KINDS = (
    "embed",
    "encoder embed",
    *_WRITERS,
    *_ENCODER,
    *_SUBLAYER_BIASES,
    *STEERING,
    *(f"encoder {name}" for name in STEERING),
    *FEATURES,
    *ERRORS,
    *_BIASES[len(_SUBLAYER_BIASES) :],
    "mixer",
    "per_layer_embed",
    "bias",
)
"""Kinds of an encoder-decoder's encoder have its name; a single stack's have not. ``"bias"`` is
what biases alone make of a query or a key."""
COLUMNS = ("layer", "pos", "head", "source", "neuron", "expert")


@storage.storable
@dataclass(frozen=True, eq=False)
class Components:
    """What writes to the residual stream: sublayers, heads, sources, neurons, biases, hooks.

    Every field has one number for each component; -1 where it has no meaning. Sentences may have
    different numbers of components: the last places of those with fewer are empty (`is_empty`).

    An attention neuron is one dimension of a head's values. It reads several sources, and what it
    reads from each is a component of its own: one neuron, several occurrences.

    Attributes:
        kind: Place in `KINDS`: the sublayer it belongs to, or the sublayer's biases.
        layer: Number of its layer.
        pos: Position whose stream it writes to.
        head: Head.
        source: Position that is read (of the encoder where the kind is ``"cross_attn"``).
        neuron: Neuron of the feed-forward sublayer (of one of its experts), feature, or dimension
            of a head's values.
        expert: Expert of a feed-forward sublayer that has several; None for no expert anywhere.
    """

    kind: Int[torch.Tensor, "batch component"]
    layer: Int[torch.Tensor, "batch component"]
    pos: Int[torch.Tensor, "batch component"]
    head: Int[torch.Tensor, "batch component"]
    source: Int[torch.Tensor, "batch component"]
    neuron: Int[torch.Tensor, "batch component"]
    expert: Int[torch.Tensor, "batch component"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.expert is None:  # files written before there were experts
            object.__setattr__(self, "expert", torch.full_like(self.kind, -1))
        for name, column in vars(self).items():
            require_shape(f"Components.{name}", tuple(column.shape), tuple(self.kind.shape))
        if self.kind.numel() and not 0 <= int(self.kind.min()) <= int(self.kind.max()) < len(KINDS):
            raise InvalidInput(
                "these are no components",
                f"kinds from {int(self.kind.min())} to {int(self.kind.max())}",
                f"0 to {len(KINDS) - 1}, places in {KINDS}",
                "Take components from a result.",
            )

    @property
    def shape(self) -> torch.Size:
        """Number of sentences, and of places for components."""
        return self.kind.shape

    def __repr__(self) -> str:
        batch, count = self.kind.shape
        shown = ", ".join(self.label(0, place) for place in range(min(6, count))) if batch else ""
        return f"Components: batch {batch}, component {count}: {shown}"

    def select(self, index: Int[torch.Tensor, "batch some"]) -> Components:
        """Returns some of the components of each sentence; empty places where the index is -1."""
        if not self.kind.shape[1]:
            return padding(*index.shape)
        found = [column.gather(1, index.clamp(min=0)) for column in vars(self).values()]
        return Components(*found).fill(index < 0, padding(*index.shape))

    def fill(self, which: Bool[torch.Tensor, "batch component"], others: Components) -> Components:
        """Returns the same with other components at some places."""
        pairs = zip(vars(others).values(), vars(self).values(), strict=True)
        return Components(*(torch.where(which, new, old) for new, old in pairs))

    def named(self, columns: tuple[str, ...] = COLUMNS) -> tuple[str, ...]:
        """Returns the columns that have a meaning: that of experts where there are any."""
        experts = bool((self.expert >= 0).any())
        return tuple(name for name in columns if experts or name != "expert")

    def at(self, row: int, place: int) -> dict[str, Any]:
        """Returns one component as names and values; None where a column has no meaning."""
        found = {name: int(getattr(self, name)[row, place]) for name in COLUMNS}
        named = {name: None if value < 0 else value for name, value in found.items()}
        return {"kind": KINDS[int(self.kind[row, place])], **named}

    def label(self, row: int, place: int) -> str:
        """Returns a short name: ``L3H5``, ``L3H5<-2``, ``L3N120``, ``L3E2N7`` or ``L3 mlp``.

        ``<-2`` is the position that is read; an empty place has no name.
        """
        one = self.at(row, place)
        if one["pos"] is None:
            return ""
        if one["kind"] in ("embed", "encoder embed"):
            return one["kind"]
        return short_name(**{name: value for name, value in one.items() if name != "pos"})

    def of_kind(self, kind: str) -> torch.Tensor:
        """Returns which components are of a kind."""
        return self.kind == KINDS.index(kind)

    def numbers(self) -> Int[torch.Tensor, "batch component"]:
        """Returns one number for each component, the same wherever in this table it stands."""
        result = torch.zeros_like(self.kind)
        for column in vars(self).values() if self.kind.numel() else ():
            result = result * (int(column.max()) + 2) + column + 1
        return result

    def is_empty(self) -> torch.Tensor:
        """Returns which places hold no component."""
        return self.pos < 0

    def is_bias(self) -> torch.Tensor:
        """Returns which components are biases, which no head and no neuron writes."""
        numbers = torch.tensor([KINDS.index(kind) for kind in (*_BIASES, "bias")])
        return torch.isin(self.kind, numbers.to(self.kind.device))


def short_name(kind: str, layer: int | None, **cut: int | None) -> str:
    """Returns the short name of a component, by the numbers that cut it out of its sublayer."""
    point, *what = kind.removeprefix("encoder ").split()
    if what not in ([], ["feature"]) or not any(number is not None for number in cut.values()):
        return f"L{layer} {kind}"
    name = f"L{layer}{'E' if kind.startswith('encoder ') else 'X' if point == 'cross_attn' else ''}"
    name += "" if point in _WRITERS else f" {point} "
    letters = {"expert": "E", "head": "H", "neuron": "F" if what else "N", "source": "<-"}
    numbers = ((letter, cut.get(column)) for column, letter in letters.items())
    return name + "".join(f"{letter}{number}" for letter, number in numbers if number is not None)


@dataclass(frozen=True)
class Grid:
    """All components of a sublayer, without a table of them.

    Attributes:
        kind: Their kind.
        layer: Their layer.
        pos: Position whose stream they write to, in each sentence.
        axes: Columns that tell them apart and the numbers in each, the last one changing first.
    """

    kind: str
    layer: int
    pos: Int[torch.Tensor, " batch"]
    axes: tuple[tuple[str, range], ...] = ()

    @property
    def count(self) -> int:
        """How many they are."""
        return prod(len(numbers) for _, numbers in self.axes)

    def at(self, place: Int[torch.Tensor, "batch some"]) -> Components:
        """Returns the components at some places."""
        place = place.cpu()
        columns: dict[str, Any] = dict.fromkeys(COLUMNS, torch.full_like(place, -1))
        columns["layer"] = torch.full_like(place, self.layer)
        columns["pos"] = self.pos.cpu()[:, None].expand_as(place)
        for name, numbers in reversed(self.axes):
            columns[name] = numbers.start + place % len(numbers)
            place = place // len(numbers)
        return Components(torch.full_like(place, KINDS.index(self.kind)), **columns)

    def find(self, some: Components) -> Int[torch.Tensor, "batch some"]:
        """Returns the places of components; -1 of those that are none of these."""
        place = torch.zeros_like(some.kind)
        mine = some.of_kind(self.kind) & (some.layer == self.layer)
        mine &= some.pos == self.pos.cpu()[:, None]
        for name, numbers in self.axes:
            column = getattr(some, name) - numbers.start
            mine &= (column >= 0) & (column < len(numbers))
            place = place * len(numbers) + column
        named = dict(self.axes)
        for name in ("head", "source", "neuron", "expert"):
            mine &= (getattr(some, name) >= 0) == (name in named)
        return place.masked_fill(~mine, -1)

    def table(self) -> Components:
        """Returns all of them."""
        return self.at(torch.arange(self.count).expand(len(self.pos), -1))


def taken(
    values: Num[torch.Tensor, "batch component"], index: Int[torch.Tensor, "batch some"]
) -> Num[torch.Tensor, "batch some"]:
    """Returns some of the numbers of each sentence; NaN (whole numbers: -1) where the index is."""
    nothing = torch.nan if values.is_floating_point() else -1
    if not values.shape[1]:
        return values.new_full(index.shape, nothing)
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, nothing)


def finest(components: Components) -> str:
    """Returns the finest cut that one of them comes from: of a head's values, heads, or neither."""
    if bool(((components.head >= 0) & (components.neuron >= 0)).any()):
        return "attn_neuron"
    return "head" if bool((components.head >= 0).any()) else "ff_neuron"


def padding(batch: int, count: int) -> Components:
    """Returns places of a table that hold no component."""
    empty = torch.full((batch, count), -1)
    return Components(torch.zeros_like(empty), *[empty] * len(COLUMNS))


def join(parts: list[Components]) -> Components:
    """Returns the components of several tables, one after the other."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Components(*(torch.cat(column, dim=1) for column in columns))


def of_encoder(components: Components) -> Components:
    """Returns components of a stream of an encoder-decoder's encoder, under their names there."""
    names = [name if name.startswith("encoder") else f"encoder {name}" for name in KINDS]
    table = torch.tensor([KINDS.index(n) if n in KINDS else i for i, n in enumerate(names)])
    return replace(components, kind=table[components.kind])
