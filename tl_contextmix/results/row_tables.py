"""Results that are rows, each a dataclass of numbers and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results.base import Result

if TYPE_CHECKING:
    import pandas

Cells = Mapping[str, "str | Callable[[Any], Any]"]
"""Columns of a table: heading, and the field that a row shows there, or a function of the row."""


class RowTable(Result):
    """A result that is rows of one class; its subclasses declare what is shown of a row."""

    ROW: ClassVar[type]
    """Class of a row."""
    ROWS: ClassVar[str] = "rows"
    """The field that holds the rows."""
    COMPUTED: ClassVar[tuple[str, ...]] = ()
    """Properties of a row that are columns of the table too."""
    CELLS: ClassVar[Cells]
    """Columns of the picture."""
    TITLE: ClassVar[str] = ""
    CAPTION: ClassVar[str] = ""

    def __repr__(self) -> str:
        title = f": {self._title()}" if hasattr(self, "title") else ""
        return f"{type(self).__name__}{title}\n{as_text(self.to_dataframe())}"

    def _title(self) -> str:
        return vars(self).get("title", self.TITLE)

    def _caption(self) -> str:
        return vars(self).get("caption", self.CAPTION)

    def _joined(self, other: object) -> Any:
        """Returns the rows of both, under this one's heading."""
        if type(self) is not type(other):
            return NotImplemented
        return replace(self, **{self.ROWS: getattr(self, self.ROWS) + getattr(other, self.ROWS)})

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per entry: its fields."""
        return frame_of(self.ROW, getattr(self, self.ROWS), self.COMPUTED)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table."""
        return (table_of(getattr(self, self.ROWS), self.CELLS, self._title(), self._caption()),)


def frame_of(kind: type, rows: Sequence[Any], computed: Sequence[str] = ()) -> pandas.DataFrame:
    """Returns rows of a dataclass as a table of its fields and some properties.

    A field that is no part of a row's text (``repr=False``) is no column either.
    """
    import pandas

    names = [*(field.name for field in fields(kind) if field.repr), *computed]
    return pandas.DataFrame([[getattr(row, n) for n in names] for row in rows], columns=names)


def table_of(
    rows: Sequence[Any], cells: Cells, title: str, caption: str, signed: tuple[str, ...] = ()
) -> Table:
    """Returns the picture of rows."""
    shown = tuple(
        tuple(getattr(row, what) if isinstance(what, str) else what(row) for what in cells.values())
        for row in rows
    )
    return Table(title, caption, tuple(cells), shown, signed)


def interval(row: Any) -> str:
    """Returns the interval of a row that has one."""
    return f"{row.low:.3f} to {row.high:.3f}"


def memory_name(row: Any) -> str:
    """Returns the name of a memory: its layer and neuron."""
    return f"L{row.layer}.{row.neuron}"


def token_at(token: str, position: int) -> str:
    """Returns a token with its position; nothing becomes a sign."""
    return f"{token or '∅'} ({position})"


def as_text(frame: pandas.DataFrame, places: int = 3) -> str:
    """Returns a table as text."""
    return frame.round(places).to_string(index=False)
