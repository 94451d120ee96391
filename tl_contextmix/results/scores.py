"""How well maps do, with chance levels and intervals beside every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.base import Result

if TYPE_CHECKING:
    import pandas


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


@storage.storable
@dataclass(frozen=True, eq=False)
class Score(Result):
    """Figures about one map or several.

    Attributes:
        rows: The figures.
        title: Heading.
        caption: How to read them.
    """

    rows: tuple[ScoreRow, ...]
    title: str
    caption: str

    def __repr__(self) -> str:
        return f"Score: {self.title}\n{self.to_dataframe().round(3).to_string(index=False)}"

    def __add__(self, other: Score) -> Score:
        """Returns the figures of both, under this one's heading."""
        if not isinstance(other, Score):
            return NotImplemented
        return Score(rows=self.rows + other.rows, title=self.title, caption=self.caption)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per figure."""
        import pandas

        columns = list(ScoreRow.__dataclass_fields__)
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table."""
        return (figure_table(self.rows, self.title, self.caption),)


def figure_table(rows: Sequence[ScoreRow], title: str, caption: str) -> Table:
    """Returns the table of figures."""
    return Table(
        title=title,
        caption=caption,
        columns=("method", "layer", "metric", "value", "95 % interval", "chance", "n"),
        rows=tuple(
            (
                row.method,
                row.layer,
                row.metric,
                row.value,
                f"{row.low:.3f} to {row.high:.3f}",
                row.chance,
                row.sentences,
            )
            for row in rows
        ),
    )
