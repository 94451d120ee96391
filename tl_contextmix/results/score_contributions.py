"""Why a head looks where it does: its score before the softmax, by pairs of components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.core.validation import require_choice
from tl_contextmix.plotting.panels import Heatmap, Panel, Place, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, largest, require_place
from tl_contextmix.results.base import Result
from tl_contextmix.results.component_sets import SHOWN
from tl_contextmix.results.components import Components, short_name
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class ScoreContributions(Result):
    """An attention score before the softmax as an exact sum over pairs of components.

    Of each pair one wrote to the stream that the query reads, the other to that of the key. Norms
    and positions are frozen at their real values. Only differences of scores between sources
    decide where a head looks; a number alone says what the score is made of.

    Attributes:
        scores: What each pair brings: a row for each component of the target's stream, a column for
            each of the source's. They and ``position`` add up to ``score``.
        targets: What the rows belong to; the last one, ``bias``, is what W_Q's bias and that of the
            norm before it make of the query.
        sources: What the columns belong to, likewise.
        position: What positions alone add: ALiBi, relative biases. Rotations are in ``scores``.
        score: The model's own score, before a soft cap.
        weight: What the softmax makes of it: the attention weight.
        soft_cap: The softmax gets ``cap * tanh(score / cap)``; None: it gets the score.
        layer: The layer.
        head: The head.
        target: The position that looks.
        source: The position that it looks at.
        kind: ``"attn"``, ``"cross_attn"`` or ``"encoder attn"``.
        by: Into what attention was cut.
        tokens: The tokens of the target's stack.
        read: The tokens of the source's.
        provenance: Where the numbers come from.
    """

    LABELS = {}

    scores: Float[torch.Tensor, "target source"]
    targets: Components
    sources: Components
    position: float
    score: float
    weight: float
    soft_cap: float | None
    layer: int
    head: int
    target: int
    source: int
    kind: str
    by: str
    tokens: Tokens
    read: Tokens
    provenance: Provenance

    def _require_whole(self) -> None:
        """Raises InvalidInput for a position that there is not, too."""
        super()._require_whole()
        for name, side in (("target", self.tokens), ("source", self.read)):
            require_place(name, getattr(self, name), side.shape[1])

    def labels(self, axis: str) -> tuple[str, ...]:
        """Returns the short names of the components of an axis, ``"target"`` or ``"source"``."""
        require_choice("axis", axis, ("target", "source"))
        side = self.targets if axis == "target" else self.sources
        return tuple(side.label(0, place) for place in range(side.shape[1]))

    def asked(self) -> str:
        """Returns what is explained, such as ``L3H0 from ' cabinet' (5) to ' keys' (2)``."""
        ends = (self.tokens, self.target), (self.read, self.source)
        target, source = (f"{side.strings[0][pos]!r} ({pos})" for side, pos in ends)
        return f"{short_name(self.kind, self.layer, head=self.head)} from {target} to {source}"

    def __repr__(self) -> str:
        lines = [
            f"ScoreContributions of {self.asked()}: score {self.score:.3f}, {self.position:+.3f} "
            f"of it by positions, attention {self.weight:.2f}"
        ]
        lines += [f"  {query} x {key} {value:+.3f}" for query, key, value in self._largest(5)]
        return "\n".join(lines)

    def reasons(self, k: int = 3) -> tuple[str, ...]:
        """Returns the largest pairs in words, see `AttributionGraph.with_scores`."""
        token = f"{self.read.strings[0][self.source]!r} ({self.source})"
        begin = f"{token} has score {self.score:+.2f}, by query x key"
        pairs = (f"{query} x {key} {value:+.2f}" for query, key, value in self._largest(k))
        return (begin, *pairs)

    def _largest(self, k: int) -> list[tuple[str, str, float]]:
        queries, keys = self.labels("target"), self.labels("source")
        result = []
        for place in largest(self.scores.abs().flatten(), k).tolist():
            row, column = divmod(place, len(keys))
            result.append((queries[row], keys[column], float(self.scores[row, column])))
        return result

    def to_dataframe(self, rows: str = "pairs") -> pandas.DataFrame:
        """Returns a table.

        Args:
            rows: ``"pairs"``: a row for each pair. ``"target"``, ``"source"``: one for each
                component of that side, with its sum over the other.
        """
        import pandas

        require_choice("table", rows, ("pairs", "target", "source"))
        if rows != "pairs":
            other = int(rows == "target")
            names = {"component": self.labels(rows), "score": as_array(self.scores.sum(dim=other))}
            return pandas.DataFrame(names)
        queries, keys = self.labels("target"), self.labels("source")
        return pandas.DataFrame(
            {
                "target_component": [name for name in queries for _ in keys],
                "source_component": [*keys] * len(queries),
                "score": as_array(self.scores).reshape(-1),
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns the map of pairs, and the components of either side by their sums."""
        name, way = self.asked().split(maxsplit=1)
        title = f"Why {name} looks {way}"
        queries, keys = self.labels("target"), self.labels("source")
        caption = (
            "What each pair brings to the score before the softmax. Rows wrote to the stream that "
            "the query reads, columns to that of the key."
        )
        rows = []
        for side, place, labels in (
            ("query", Place(self.tokens.strings[0][self.target], self.target), queries),
            ("key", Place(self.read.strings[0][self.source], self.source), keys),
        ):
            sums = self.scores.sum(dim=int(side == "query"))
            best = largest(sums.abs(), SHOWN // 2).tolist()
            rows += [(side, place, labels[one], float(sums[one])) for one in best]
        return (
            Heatmap(
                title=title,
                caption=caption,
                values=self.scores[None],
                sheets=("pairs",),
                rows=queries,
                columns=keys,
                unit="score",
                row_positions=(-1,) * len(queries),
                column_positions=(-1,) * len(keys),
                axes=("wrote what the query reads", "wrote what the key reads"),
            ),
            Table(
                title=f"{title}: both sides",
                caption=f"Sums over the other side. Positions alone add {self.position:+.3f}; the "
                f"score is {self.score:+.3f}, its attention weight {self.weight:.3f}.",
                columns=("side", "token", "component", "sum"),
                rows=tuple(rows),
                signed=("sum",),
            ),
        )
