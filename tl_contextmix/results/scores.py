"""How well maps do, with chance levels and intervals beside every figure."""

from __future__ import annotations

from dataclasses import dataclass

from tl_contextmix.results import storage
from tl_contextmix.results.row_tables import RowTable, interval


@storage.storable
@dataclass(frozen=True)
class ScoreRow:
    """One figure.

    Attributes:
        method: The method that made the map, or two of them that were compared.
        layer: The layer, see `ContextMap.layer_names`.
        metric: What was measured.
        value: Mean over sentences.
        low: Lower end of the 95 % bootstrap interval over sentences.
        high: Upper end.
        chance: What a map without information gets; NaN where there is no such level.
        sentences: Over how many sentences.
    """

    method: str
    layer: str
    metric: str
    value: float
    low: float
    high: float
    chance: float
    sentences: int


FIGURE_CELLS = {
    **{name: name for name in ("method", "layer", "metric", "value")},
    "95 % interval": interval,
    "chance": "chance",
    "n": "sentences",
}


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Score(RowTable):
    """Figures about one map or several.

    Attributes:
        rows: The figures.
        title: Heading.
        caption: How to read them.
    """

    ROW = ScoreRow
    CELLS = FIGURE_CELLS

    rows: tuple[ScoreRow, ...]
    title: str
    caption: str

    def __add__(self, other: Score) -> Score:
        """Returns the figures of both, under this one's heading."""
        return self._joined(other)
