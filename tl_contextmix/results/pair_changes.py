"""The pairs of tokens that changed most between two maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import frame_of, table_of, token_at

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True)
class Pair:
    """How one source-target pair changed.

    Attributes:
        batch: Row of the batch.
        layer: Number of the layer.
        target: Position written.
        source: Position read.
        target_token: Its text.
        source_token: Its text.
        before: Score before.
        after: Score after.
    """

    batch: int
    layer: int
    target: int
    source: int
    target_token: str
    source_token: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Score after minus score before."""
        return self.after - self.before


@storage.storable
@dataclass(frozen=True, eq=False)
class PairChanges(Result):
    """The pairs that grew most and shrank most between two maps.

    Attributes:
        amplified: The pairs that grew, by sentence and layer, largest growth first.
        suppressed: The pairs that shrank, largest loss first.
        before: Point of the first map.
        after: Point of the second map.
        unit: What a score measures.
        provenance: Where the numbers come from.
        title: Heading.
    """

    amplified: tuple[Pair, ...]
    suppressed: tuple[Pair, ...]
    before: str
    after: str
    unit: str
    provenance: Provenance
    title: str = "Pairs that changed most"

    def __repr__(self) -> str:
        return (
            f"PairChanges from {self.before} to {self.after}, {self.unit}: "
            f"{len(self.amplified)} amplified, {len(self.suppressed)} suppressed"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per pair: direction, the fields of `Pair`, change."""
        frame = frame_of(Pair, self.amplified + self.suppressed, ("change",))
        directions = ["amplified"] * len(self.amplified) + ["suppressed"] * len(self.suppressed)
        frame.insert(0, "direction", directions)
        return frame

    def panels(self) -> tuple[Panel, ...]:
        """Returns one table for each direction."""
        caption = f"From {self.before} to {self.after}, {self.unit}."
        return tuple(
            table_of(pairs, _CELLS, f"{self.title}: {direction}", caption, ("change",))
            for direction, pairs in (
                ("amplified", self.amplified),
                ("suppressed", self.suppressed),
            )
        )


_CELLS = {
    "sentence": "batch",
    "layer": "layer",
    "source": lambda pair: token_at(pair.source_token, pair.source),
    "target": lambda pair: token_at(pair.target_token, pair.target),
    **{name: name for name in ("before", "after", "change")},
}
