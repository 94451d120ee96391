"""What a result shows, not how: the vocabulary between results and their pictures.

A result lists panels. A new kind of picture is one class here and one row of `page.DRAW`: as plain
text, in viewers without scripts and as a figure a panel is its `table` unless it has more to show.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.survey import Survey, survey


class Place(NamedTuple):
    """A token and its position in the input."""

    token: str
    position: int


Cell = str | float | int | Place | None


# Not eq: subclasses hold tensors, which have no yes or no for ==.
@dataclass(frozen=True, eq=False)
class Panel:
    """What all panels have.

    Attributes:
        title: Heading.
        caption: One or two sentences on how to read it, with units.
    """

    title: str
    caption: str

    def table(self) -> Table:
        """Returns the numbers that stand out."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Heatmap(Panel):
    """A stack of matrices over tokens, one sheet at a time.

    Attributes:
        values: One matrix per sheet; NaN means there is nothing to show in that cell.
        sheets: Name of each sheet, for example ``"layer 0"``.
        rows: Token of each row (the target, what is written).
        columns: Token of each column (the source, what is read).
        causal: Whether cells with column > row cannot be other than zero.
        unit: What a cell measures, for the legend.
        layers: Layer of each sheet: maps of one section show the same layer. Empty: they are not
            layers.
        heads: Head of each sheet; empty: heads are not apart.
        tokens: Which axes, ``"rows"`` and ``"columns"``, are tokens of the input: one that is
            clicked is marked in all maps of a page.
        row_positions: Position of each row in the input, which its token is shown with; empty:
            from 0.
        column_positions: The same of the columns; -1 where a column is no token.
        masked: Cells that there is no number for, where rows and columns are not the same tokens.
        sides: Names of stretches of columns and their lengths, such as a prompt and an output;
            empty: there is but one.
        axes: What rows and columns are, for figures.
    """

    values: Float[torch.Tensor, "sheet row column"]
    sheets: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    causal: bool = False
    unit: str = ""
    layers: tuple[int, ...] = ()
    heads: tuple[str, ...] = ()
    tokens: tuple[Literal["rows", "columns"], ...] = ()
    row_positions: tuple[int, ...] = ()
    column_positions: tuple[int, ...] = ()
    masked: Bool[torch.Tensor, "row column"] | None = None
    sides: tuple[tuple[str, int], ...] = ()
    axes: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        for name, tokens in (("row_positions", self.rows), ("column_positions", self.columns)):
            positions = getattr(self, name) or tuple(range(len(tokens)))
            _require(len(positions) == len(tokens), self.title, len(positions), len(tokens))
            object.__setattr__(self, name, positions)
        expected = (len(self.sheets), len(self.rows), len(self.columns))
        _require(tuple(self.values.shape) == expected, self.title, self.values.shape, expected)
        count = sum(length for _, length in self.sides)
        _require(count in (0, len(self.columns)), self.title, count, len(self.columns))
        for names in (self.layers, self.heads):
            _require(len(names) in (0, len(self.sheets)), self.title, len(names), len(self.sheets))

    @cached_property
    def survey(self) -> Survey:
        """What the map holds: looked for once, a sheet at a time."""
        return survey(self.values, self.hidden)

    @property
    def hidden(self) -> Bool[torch.Tensor, "row column"] | None:
        """Cells of later tokens, which there is no number for."""
        if not self.causal:
            return self.masked
        rows, columns = map(torch.tensor, (self.row_positions, self.column_positions))
        return columns > rows[:, None]

    @property
    def whole(self) -> bool:
        """Whether rows and columns are the same tokens, counted from 0."""
        counted = self.row_positions == tuple(range(len(self.rows)))
        same = self.row_positions == self.column_positions
        return counted and same and self.rows == self.columns

    def places(self, axis: Literal["rows", "columns"]) -> tuple[Place, ...]:
        """Returns the tokens of an axis with their positions."""
        tokens = self.rows if axis == "rows" else self.columns
        positions = self.row_positions if axis == "rows" else self.column_positions
        return tuple(map(Place, tokens, positions))

    def names(self, axis: Literal["rows", "columns"]) -> tuple[Cell, ...]:
        """Returns the tokens of an axis, with their positions if these do not count from 0."""
        places = self.places(axis)
        numbers = [place.position for place in places if place.position >= 0]
        counted = numbers == [*range(len(numbers))]
        return tuple(place.token for place in places) if counted else places

    def table(self) -> Table:
        """Returns the numbers farthest from zero."""
        rows, columns = self.places("rows"), self.places("columns")
        top = (
            (self.sheets[sheet], rows[row], columns[column], value)
            for sheet, row, column, value in self.survey.top
        )
        return Table(self.title, "", ("sheet", "row", "column", "value"), tuple(top))

    def sheet(self, place: int) -> Heatmap:
        """Returns one of the matrices, its name in the title."""
        name = self.sheets[place]
        title = self.title if len(self.sheets) == 1 else f"{self.title}, {name}"
        kept = {"layers": self.layers[place : place + 1], "heads": self.heads[place : place + 1]}
        return replace(self, title=title, values=self.values[[place]], sheets=(name,), **kept)


@dataclass(frozen=True)
class Bars(Panel):
    """One or more series of numbers over the same labels.

    Attributes:
        labels: The horizontal axis, for example layers.
        series: Name and values of each series, every one as long as ``labels``.
        unit: What the vertical axis measures.
        axis: What the labels are, for figures.
    """

    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    unit: str = ""
    axis: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for name, values in self.series:
            _require(len(values) == len(self.labels), name, len(values), len(self.labels))

    def table(self) -> Table:
        """Returns the numbers, a row for each label."""
        names, columns = zip(*self._columns(), strict=True)
        return Table(self.title, "", names, tuple(zip(*columns, strict=True)))

    def _columns(self) -> list[tuple[str, tuple[Cell, ...]]]:
        return [("", self.labels), *self.series]


Interval = tuple[float, float]


@dataclass(frozen=True)
class Curves(Bars):
    """Bars whose labels stand in an order, for example layers: drawn as lines; NaN is a gap.

    Attributes:
        intervals: Lower and upper end at each label, one list per series; empty: there are none.
    """

    intervals: tuple[tuple[Interval, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        seen = [len(ends) for ends in self.intervals]
        expected = [len(self.labels)] * len(self.series)
        _require(seen in ([], expected), self.title, seen, expected)

    def _columns(self) -> list[tuple[str, tuple[Cell, ...]]]:
        result = super()._columns()
        for place, ends in reversed([*enumerate(self.intervals, start=1)]):
            low, high = zip(*ends, strict=True) if ends else ((), ())
            name = result[place][0]
            result[place + 1 : place + 1] = [(f"{name}, from", low), (f"{name}, to", high)]
        return result


@dataclass(frozen=True)
class Table(Panel):
    """Rows of text and numbers.

    Attributes:
        columns: Column headings.
        rows: One tuple per row, as long as ``columns``. Text is shown as text, whatever it holds.
        signed: Names of columns whose numbers are coloured by sign and size.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    signed: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            _require(len(row) == len(self.columns), self.title, len(row), len(self.columns))
        unknown = set(self.signed) - set(self.columns)
        _require(not unknown, self.title, sorted(unknown), self.columns)

    def table(self) -> Table:
        """Returns itself."""
        return self


@dataclass(frozen=True)
class ColoredText(Panel):
    """A sentence with one number per token.

    Attributes:
        tokens: The tokens, in order.
        values: One number per token; zero is uncoloured, the sign chooses the colour.
        unit: What a number measures.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        _require(
            len(self.values) == len(self.tokens), self.title, len(self.values), len(self.tokens)
        )

    def table(self) -> Table:
        """Returns the tokens and their numbers."""
        rows = tuple(zip(self.tokens, self.values, strict=True))
        return Table(self.title, "", ("token", self.unit), rows)


@dataclass(frozen=True)
class Samples(Panel):
    """Several texts with one number per token, on one scale.

    Attributes:
        name: What they are samples of, for example ``"L3.17"``.
        labels: One line about each text.
        tokens: Tokens of each text.
        values: One number per token; zero is uncoloured, the sign chooses the colour.
        unit: What a number measures.
    """

    name: str
    labels: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    values: tuple[tuple[float, ...], ...]
    unit: str = ""

    def __post_init__(self) -> None:
        count = len(self.labels)
        _require(len(self.tokens) == count, self.title, len(self.tokens), count)
        seen = [len(row) for row in self.values]
        expected = [len(row) for row in self.tokens]
        _require(seen == expected, self.title, seen, expected)

    def table(self) -> Table:
        """Returns the texts."""
        rows = tuple(zip(self.labels, map("".join, self.tokens), strict=True))
        return Table(self.title, "", ("", "text"), rows)


@dataclass(frozen=True)
class Dot:
    """A node of a graph.

    Attributes:
        label: Its name.
        column: Place on the horizontal axis.
        row: Place on the vertical axis, counted from below.
        value: Its size and sign.
        facts: Names and texts of what else there is to say about it.
    """

    label: str
    column: int
    row: int
    value: float
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Graph(Panel):
    """Nodes over tokens and layers, and what runs from one to another.

    Attributes:
        columns: The horizontal axis: tokens, or names.
        rows: The vertical axis, from below.
        nodes: The nodes.
        edges: From a node (a column) to another (a row); 0 where there is none.
        unit: What sizes measure.
        axes: What rows and columns are, for figures.
    """

    columns: tuple[Place | str, ...]
    rows: tuple[str, ...]
    nodes: tuple[Dot, ...]
    edges: Float[torch.Tensor, "target source"]
    unit: str = ""
    axes: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        count = len(self.nodes)
        _require(tuple(self.edges.shape) == (count,) * 2, self.title, self.edges.shape, count)
        placed = [(dot.column, dot.row) for dot in self.nodes]
        inside = all(
            0 <= column < len(self.columns) and 0 <= row < len(self.rows) for column, row in placed
        )
        _require(inside, self.title, placed, (len(self.columns), len(self.rows)))

    @property
    def ranked(self) -> list[int]:
        """The nodes, the largest first."""
        order = sorted(range(len(self.nodes)), key=lambda i: (-abs(self.nodes[i].value), i))
        return [i for i in order if self.nodes[i].value == self.nodes[i].value]

    def largest_edges(self, count: int) -> list[tuple[int, int, float]]:
        """Returns source, target and size of the largest edges, largest first."""
        sizes = self.edges.detach().abs().cpu().flatten()
        places = sizes.topk(min(count, int((sizes > 0).sum()))).indices.tolist()
        ends = (divmod(place, len(self.nodes)) for place in places)
        return [(source, target, float(self.edges[target, source])) for target, source in ends]

    def table(self) -> Table:
        """Returns the nodes, the largest first."""
        dots = [self.nodes[place] for place in self.ranked]
        rows = tuple((dot.label, self.columns[dot.column], dot.value) for dot in dots)
        return Table(self.title, "", ("node", "at", self.unit or "value"), rows)


def _require(condition: bool, title: str, seen: object, expected: object) -> None:
    if not condition:
        raise InvalidInput(
            f"panel {title!r} cannot be built",
            seen,
            f"{expected}",
            "Give every axis as many labels as the values have entries.",
        )
