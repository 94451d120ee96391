"""How a figure goes from layer to layer, over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.core.text_metrics import Figure
from tl_contextmix.core.validation import as_list
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Curves, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.headings import known_in_words
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import RowTable, interval, table_of

EVERY = "all"
"""Name of the category of all sentences."""


@storage.storable
@dataclass(frozen=True)
class CurvePoint:
    """One figure of one layer.

    Attributes:
        metric: What was measured.
        category: Of which sentences, or ``"all"``.
        layer: Number of the layer.
        value: The figure over the sentences.
        low: Lower end of the 95 % interval: by bootstrap over sentences, of a probe over seeds.
        high: Upper end.
        sentences: Over how many sentences; those without a value (NaN) are not counted.
    """

    metric: str
    category: str
    layer: int
    value: float
    low: float
    high: float
    sentences: int


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class LayerCurves(RowTable):
    """Figures by layer, each with an interval.

    Attributes:
        points: The figures, by metric, category and layer.
        title: Heading.
        caption: How to read them.
        provenance: Where they come from.
    """

    ROW = CurvePoint
    ROWS = "points"
    CELLS = {
        **{name: name for name in ("metric", "category", "layer", "value")},
        "95 % interval": interval,
        "n": "sentences",
    }

    points: tuple[CurvePoint, ...]
    title: str
    caption: str
    provenance: Provenance

    def __add__(self, other: LayerCurves) -> LayerCurves:
        """Returns the figures of both, under this one's heading."""
        return self._joined(other)

    def select(self, metric: str, category: str = EVERY) -> tuple[CurvePoint, ...]:
        """Returns one curve, layer by layer.

        Raises:
            InvalidInput: If there is none of this metric and category.
        """
        result = tuple(p for p in self.points if (p.metric, p.category) == (metric, category))
        if not result:
            known = list(dict.fromkeys((p.metric, p.category) for p in self.points))
            raise InvalidInput(
                "there is no such curve",
                repr((metric, category)),
                f"one of {known}",
                "Ask for this metric, or for this category.",
            )
        return result

    def panels(self) -> tuple[Panel, ...]:
        """Returns a chart per metric, a series per category, and the table with intervals."""
        title, caption = f"{self.title}: figures", "With 95 % intervals."
        metrics = dict.fromkeys(point.metric for point in self.points)
        table = table_of(self.points, self.CELLS, title, caption)
        return (*map(self._chart, metrics), table)

    def _chart(self, metric: str) -> Curves:
        points = [point for point in self.points if point.metric == metric]
        layers = sorted({point.layer for point in points})
        categories = dict.fromkeys(point.category for point in points)
        found = {(point.category, point.layer): point for point in points}
        # Models differ in depth: a layer that a curve lacks is a gap.
        lines = [[found.get((category, layer)) for layer in layers] for category in categories]
        return Curves(
            title=f"{self.title}: {metric}",
            caption=self.caption,
            labels=tuple(f"layer {layer}" for layer in layers),
            series=tuple(
                (known_in_words(category), tuple(one.value if one else nan for one in line))
                for category, line in zip(categories, lines, strict=True)
            ),
            intervals=tuple(
                tuple((one.low, one.high) if one else (nan, nan) for one in line) for line in lines
            ),
            unit=metric,
            axis="layer",
        )


def curve_point(
    metric: str, figure: Figure, category: str, layer: int, counts: Sequence[Sequence[float]]
) -> CurvePoint:
    """Returns a figure and its interval; ``counts`` are what each sentence adds to its sums."""
    # A sentence that adds nothing to any count has no value.
    kept = [row for row in counts if any(row)]
    if not kept:
        nothing = float("nan")
        return CurvePoint(metric, category, layer, nothing, nothing, nothing, 0)
    table = torch.tensor(kept, dtype=torch.float64).reshape(len(kept), -1)
    value = figure(table.sum(0).tolist())
    low, high = bootstrap_interval(table, figure, resamples=1000)
    return CurvePoint(metric, category, layer, float(value), low, high, len(kept))


def as_texts(given: Any, name: str) -> tuple[str, ...]:
    """Returns one text, or a list or a column of them, as a tuple."""
    listed = as_list(given)
    listed = [listed] if isinstance(listed, str) else listed
    if isinstance(listed, Sequence) and all(isinstance(one, str) for one in listed):
        return tuple(listed)
    raise InvalidInput(
        f"{name} cannot be read",
        repr(given),
        "a list with one text per input",
        "Turn numbers into text; None has no place among them.",
    )


def category_groups(categories: object, count: int) -> dict[str, list[int]]:
    """Returns the sentences of each category, and all of them."""
    if categories is None:
        return {EVERY: list(range(count))}
    names = as_texts(categories, "categories")
    if isinstance(categories, str) or len(names) != count:
        raise InvalidInput(
            "categories do not fit the inputs",
            repr(categories) if isinstance(categories, str) else f"{len(names)} categories",
            f"a list of {count}, one per input",
            "Give one category per input.",
        )
    require_no_whole(names)
    groups: dict[str, list[int]] = {EVERY: list(range(count))}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


def require_no_whole(names: Iterable[str]) -> None:
    """Raises InvalidInput if a category has the name that stands for all of them together."""
    if EVERY in names:
        raise InvalidInput(
            "a category cannot be told from all inputs together",
            "'all'",
            "names other than 'all'",
            "Give this category another name.",
        )
