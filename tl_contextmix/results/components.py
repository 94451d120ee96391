"""Components of the residual stream as columns of a table, one row of columns per sentence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int

from tl_contextmix import storage
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.results.axes import require_shape

_WRITERS = ("attn", "cross_attn", "mlp")
_ENCODER = ("encoder attn", "encoder mlp")
_BIASES = tuple(f"{name} bias" for name in (*_WRITERS, *_ENCODER))
KINDS = ("embed", "encoder embed", *_WRITERS, *_ENCODER, *_BIASES)
"""Kinds of an encoder-decoder's encoder have its name; a single stack's have not."""
COLUMNS = ("layer", "pos", "head", "source", "neuron")
# What stands in front of the numbers of a head or neuron.
_SHORT = {"attn": "", "cross_attn": "X", "mlp": "", "encoder attn": "E", "encoder mlp": "E"}


@storage.storable
@dataclass(frozen=True, eq=False)
class Components:
    """What writes to the residual stream: sublayers, heads, sources, neurons, biases.

    Every field has one number for each component; -1 where it has no meaning.

    Attributes:
        kind: Place in `KINDS`: the sublayer it belongs to, or the sublayer's biases.
        layer: Number of its layer.
        pos: Position whose stream it writes to.
        head: Head.
        source: Position that is read (of the encoder where the kind is ``"cross_attn"``).
        neuron: Neuron of the feed-forward sublayer, or dimension of a head's values.
    """

    kind: Int[torch.Tensor, "batch component"]
    layer: Int[torch.Tensor, "batch component"]
    pos: Int[torch.Tensor, "batch component"]
    head: Int[torch.Tensor, "batch component"]
    source: Int[torch.Tensor, "batch component"]
    neuron: Int[torch.Tensor, "batch component"]

    def __post_init__(self) -> None:
        for field in fields(self):
            require_shape(
                f"Components.{field.name}", getattr(self, field.name), tuple(self.kind.shape)
            )
        if self.kind.numel() and not 0 <= int(self.kind.min()) <= int(self.kind.max()) < len(KINDS):
            raise InvalidInput(
                four_parts(
                    "these are no components",
                    f"kinds from {int(self.kind.min())} to {int(self.kind.max())}",
                    f"0 to {len(KINDS) - 1}, places in {KINDS}",
                    "Take components from a result.",
                )
            )

    def __repr__(self) -> str:
        batch, count = self.kind.shape
        shown = ", ".join(self.label(0, place) for place in range(min(6, count))) if batch else ""
        return f"Components: batch {batch}, component {count}: {shown}"

    def select(self, index: Int[torch.Tensor, "batch some"]) -> Components:
        """Returns some of the components of each sentence."""
        return Components(**{f.name: getattr(self, f.name).gather(1, index) for f in fields(self)})

    def at(self, row: int, place: int) -> dict[str, Any]:
        """Returns one component as names and values; None where a column has no meaning."""
        found = {name: int(getattr(self, name)[row, place]) for name in COLUMNS}
        named = {name: None if value < 0 else value for name, value in found.items()}
        return {"kind": KINDS[int(self.kind[row, place])], **named}

    def label(self, row: int, place: int) -> str:
        """Returns a short name, such as ``L3H5``, ``L3H5<-2``, ``L3N120`` or ``L3 mlp``."""
        one = self.at(row, place)
        if one["kind"] in ("embed", "encoder embed"):
            return one["kind"]
        base = f"L{one['layer']}"
        cut = [one["head"], one["neuron"], one["source"]] != [None, None, None]
        if one["kind"] not in _SHORT or not cut:
            return f"{base} {one['kind']}"
        base += _SHORT[one["kind"]]
        base += "" if one["head"] is None else f"H{one['head']}"
        base += "" if one["neuron"] is None else f"N{one['neuron']}"
        return base + ("" if one["source"] is None else f"<-{one['source']}")

    def of_kind(self, kind: str) -> torch.Tensor:
        """Returns which components are of a kind."""
        return self.kind == KINDS.index(kind)

    def numbers(self) -> Int[torch.Tensor, "batch component"]:
        """Returns one number for each component, the same wherever in this table it stands."""
        found = torch.zeros_like(self.kind)
        for field in fields(self):
            column = getattr(self, field.name)
            found = found * (int(column.max()) + 2) + column + 1
        return found

    def find(self, wanted: Components) -> Int[torch.Tensor, "batch some"]:
        """Returns the places of components in this table, sentence by sentence.

        Raises:
            InvalidInput: If one of them is not there.
        """
        count = self.kind.shape[1]
        table, asked = join([self, wanted]).numbers().split([count, wanted.kind.shape[1]], dim=1)
        ordered, order = table.sort(dim=1)
        at = torch.searchsorted(ordered.contiguous(), asked.contiguous()).clamp(max=count - 1)
        missing = ordered.gather(1, at) != asked
        if bool(missing.any()):
            row, place = missing.nonzero()[0].tolist()
            raise InvalidInput(
                four_parts(
                    "this component is not written to the stream here",
                    wanted.label(row, place),
                    "components found on the same input, at the same position",
                    "Give the input that the components were found on.",
                )
            )
        return order.gather(1, at)

    def is_bias(self) -> torch.Tensor:
        """Returns which components are biases, which no head and no neuron writes."""
        return self.kind >= KINDS.index(_BIASES[0])


def padding(batch: int, count: int) -> Components:
    """Returns places of a table that hold no component."""
    empty = torch.full((batch, count), -1)
    return Components(torch.zeros_like(empty), *[empty] * len(COLUMNS))


def components(
    batch: int, pos: torch.Tensor, kind: str, layer: int, **columns: torch.Tensor
) -> Components:
    """Returns components of one sublayer, the same for every sentence but for their position.

    Args:
        batch: Number of sentences.
        pos: Position whose stream they write to, in each sentence.
        kind: Their kind.
        layer: Their layer.
        columns: Further columns, of one length.
    """
    count = max((len(column) for column in columns.values()), default=1)
    given = {name: columns.get(name, torch.full((count,), -1)) for name in COLUMNS}
    given["layer"] = torch.full((count,), layer)
    found = {name: column.cpu().expand(batch, count) for name, column in given.items()}
    found["pos"] = pos.cpu()[:, None].expand(batch, count)
    return Components(kind=torch.full((batch, count), KINDS.index(kind)), **found)


def join(parts: list[Components]) -> Components:
    """Returns the components of several tables, one after the other."""
    return Components(
        **{
            f.name: torch.cat([getattr(part, f.name) for part in parts], dim=1)
            for f in fields(Components)
        }
    )
