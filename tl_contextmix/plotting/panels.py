"""What a result shows, not how: the vocabulary between results and `render`.

A result lists panels; `render` turns each into HTML. A new kind of picture is one class here and
one function there. Panels hold plain Python and NumPy-free data, so that they can be compared,
tested and drawn without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float

from tl_contextmix.errors import bad

Cell = str | float | int | None


# Not eq: tensors have no yes or no for ==.
@dataclass(frozen=True, eq=False)
class Heatmap:
    """A stack of matrices over tokens, one sheet at a time.

    Attributes:
        title: Heading.
        caption: One or two sentences on how to read it, with units.
        values: One matrix per sheet; NaN means there is nothing to show in that cell.
        sheets: Name of each sheet, for example ``"layer 0"``.
        rows: Token of each row (the target, what is written).
        columns: Token of each column (the source, what is read).
        causal: Whether cells with column > row cannot be other than zero.
        unit: What a cell measures, for the legend.
        groups: Which sheets belong together, for example the layer of each head: where there are
            too many cells to draw one by one, the mean of each group is drawn. Empty: none do.
    """

    title: str
    caption: str
    values: Float[torch.Tensor, "sheet row column"]
    sheets: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    causal: bool = False
    unit: str = ""
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.sheets), len(self.rows), len(self.columns))
        _require(tuple(self.values.shape) == expected, self.title, self.values.shape, expected)
        count = len(self.groups)
        _require(count in (0, len(self.sheets)), self.title, count, len(self.sheets))

    def sheet(self, place: int) -> Heatmap:
        """Returns one of the matrices, its name in the title."""
        name = self.sheets[place]
        title = self.title if len(self.sheets) == 1 else f"{self.title}, {name}"
        return replace(self, title=title, values=self.values[[place]], sheets=(name,), groups=())


@dataclass(frozen=True)
class Bars:
    """One or more series of numbers over the same labels.

    Attributes:
        title: Heading.
        caption: How to read it.
        labels: The horizontal axis, for example layers.
        series: Name and values of each series, every one as long as ``labels``.
        unit: What the vertical axis measures.
    """

    title: str
    caption: str
    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    unit: str = ""

    def __post_init__(self) -> None:
        for name, values in self.series:
            _require(len(values) == len(self.labels), name, len(values), len(self.labels))


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


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        title: Heading.
        caption: How to read it.
        columns: Column headings.
        rows: One tuple per row, as long as ``columns``. Text is shown as text, whatever it holds.
        signed: Names of columns whose numbers are coloured by sign and size.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    signed: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            _require(len(row) == len(self.columns), self.title, len(row), len(self.columns))
        unknown = set(self.signed) - set(self.columns)
        _require(not unknown, self.title, sorted(unknown), self.columns)


@dataclass(frozen=True)
class ColoredText:
    """A sentence with one number per token.

    Attributes:
        title: Heading.
        caption: How to read it.
        tokens: The tokens, in order.
        values: One number per token; zero is uncoloured, the sign chooses the colour.
        unit: What a number measures.
    """

    title: str
    caption: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        _require(
            len(self.values) == len(self.tokens), self.title, len(self.values), len(self.tokens)
        )


@dataclass(frozen=True)
class Samples:
    """Several texts with one number per token, on one scale.

    Attributes:
        title: Heading.
        caption: How to read them.
        name: What they are samples of, for example ``"L3.17"``.
        labels: One line about each text.
        tokens: Tokens of each text.
        values: One number per token; zero is uncoloured, the sign chooses the colour.
        unit: What a number measures.
    """

    title: str
    caption: str
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


Panel = Heatmap | Bars | Curves | Table | ColoredText | Samples


def _require(condition: bool, title: str, seen: object, expected: object) -> None:
    if not condition:
        raise bad(
            f"panel {title!r} cannot be built",
            seen,
            f"{expected}",
            "Give every axis as many labels as the values have entries.",
        )
