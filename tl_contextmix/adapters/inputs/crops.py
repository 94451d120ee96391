"""Rows of like length run together: what is computed is not computed of padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from tl_contextmix.adapters.inputs.padding import unsafe_padding
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView

# A row may be padded to so many times its length: attention costs the square of it.
_LONGER = 1.2
# Up to here a pass takes its time whatever the length.
_SHORT = 8
# Pairs of tokens in all layers of a group: patterns of 16 heads take 1 GiB in single precision.
_PAIRS = 2**24


@dataclass(frozen=True)
class Crop:
    """Some rows of a batch and the columns that hold all of their real tokens.

    Attributes:
        rows: The rows.
        main: Columns of the main side.
        decoder: Columns of the decoder side of an encoder-decoder, else None.
    """

    rows: tuple[int, ...]
    main: slice
    decoder: slice | None

    def columns(self, stack: str) -> range:
        """Returns the columns of a stack, as `Batch.side` has its tokens."""
        found = self.main if self.decoder is None or stack == "encoder" else self.decoder
        return range(found.start, found.stop)

    def of(self, batch: Batch) -> Batch:
        """Returns the part of a batch."""
        rows = [*self.rows]

        def part(tensor: Tensor) -> Tensor:
            return tensor[rows][:, self.main]

        decoder = None
        if batch.decoder is not None:
            decoder = batch.decoder.each(lambda tensor: tensor[rows][:, self.decoder])
        further = {name: part(value) for name, value in batch.further.items()}
        return Batch(batch.main.each(part), decoder, further)


def crops(view: ModelView, batch: Batch) -> tuple[Crop, ...]:
    """Returns the groups of like rows that a batch is cut into, or nothing where it stays whole.

    Together they cost at most half as much again as each row alone, and hold no more activations
    at a time than fit. Where padding changes the text's own numbers, see `unsafe_padding`, the
    rows of a group are equally long and have none. Hooks of the user's own may count on the batch
    that was given: it then stays whole.
    """
    if view.hooked(backward=True):
        return ()
    sides = [batch.main] if batch.decoder is None else [batch.main, batch.decoder]
    found = [real_columns(side.mask) for side in sides]
    bounds = [*zip(*found, strict=True)]
    exact = bool(unsafe_padding(view, batch.main, placed="position_ids" in batch.further))
    layers = sum(len(blocks) for blocks in view.stacks.values())
    groups: list[_Group] = []
    # The longest first.
    orders = [[(start - stop, start) for start, stop in row] for row in bounds]
    for row in sorted(range(len(bounds)), key=orders.__getitem__):
        grown = groups[-1].with_row(row, bounds[row]) if groups else None
        if grown is not None and grown.fits(exact, layers):
            groups[-1] = grown
        else:
            groups.append(
                _Group((row,), bounds[row], [stop - start for start, stop in bounds[row]])
            )
    parts = tuple(group.crop() for group in groups)
    whole = [(0, side.mask.shape[1]) for side in sides]
    return () if len(groups) == 1 and [*groups[0].bounds] == whole else parts


def real_columns(mask: Bool[Tensor, "batch pos"]) -> list[tuple[int, int]]:
    """Returns the columns of each row from its first real token to its last."""
    first = mask.int().argmax(dim=1).tolist()
    after = mask.flip(1).int().argmax(dim=1).tolist()
    return [(start, mask.shape[1] - rest) for start, rest in zip(first, after, strict=True)]


@dataclass(frozen=True)
class _Group:
    """Rows that may run together, the columns that hold them and the least length, of each side."""

    rows: tuple[int, ...]
    bounds: Sequence[tuple[int, int]]
    shortest: Sequence[int]

    def with_row(self, row: int, bounds: Sequence[tuple[int, int]]) -> _Group:
        """Returns the group with one row more."""
        both = [*zip(self.bounds, bounds, strict=True)]
        return _Group(
            (*self.rows, row),
            [(min(a[0], b[0]), max(a[1], b[1])) for a, b in both],
            [min(n, stop - start) for n, (start, stop) in zip(self.shortest, bounds, strict=True)],
        )

    def fits(self, exact: bool, layers: int) -> bool:
        """Whether the rows are of like length, and of one where it has to be exact."""
        widths = [stop - start for start, stop in self.bounds]
        # Padding after the text of a decoder is hidden by causality from all that is real.
        if exact and widths[0] > self.shortest[0]:
            return False
        like = all(
            width <= max(_SHORT, _LONGER * least)
            for width, least in zip(widths, self.shortest, strict=True)
        )
        return like and len(self.rows) * layers * sum(widths) ** 2 <= _PAIRS

    def crop(self) -> Crop:
        """Returns what the group is of its batch."""
        columns = [slice(*bounds) for bounds in self.bounds]
        return Crop(tuple(sorted(self.rows)), columns[0], (columns[1:] or [None])[0])
