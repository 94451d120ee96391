"""Many maps of the same sentences beside each other: how well each does, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Heatmap, Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.headings import as_heading, in_plain_words
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import as_text
from tl_contextmix.results.scores import ALIGNMENT, BEST, METRICS, ScoreRow, ScoreTable

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True)
class Cost:
    """What one method takes for one sentence.

    Attributes:
        method: The method.
        seconds: Median over sentences, forward pass included.
        flops: Operations of matrix products, forward pass included, of the sentence of median
            length; a multiplication with an addition counts two.
        forward: The same operations over those of a forward pass.
    """

    method: str
    seconds: float
    flops: int
    forward: float


@storage.storable
@dataclass(frozen=True, eq=False)
class Comparison(ScoreTable):
    """How well several methods' maps of the same sentences do, and what they cost.

    Attributes:
        rows: Every figure: method, layer, metric, value, interval, chance level.
        costs: One entry per method.
        alike: How alike two methods order the sources of the target, see `alike_methods`.
        alike_methods: Methods with a map from the input to the last layer, labels of both axes of
            `alike`.
        left_out: Methods that the model does not support, each with the reason.
        correct: In how many sentences the model prefers the right word; None where it is not known.
        sentences: How many sentences.
        dropped: Sentences that were skipped, each with the reason.
        provenance: Where it comes from.
    """

    LABELS = {"method": "alike_methods"}
    TITLE = "Every figure"
    CAPTION = "95 % bootstrap intervals over sentences."

    rows: tuple[ScoreRow, ...]
    costs: tuple[Cost, ...]
    alike: Float[torch.Tensor, "method method"]
    alike_methods: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    correct: int | None
    sentences: int
    dropped: tuple[tuple[str, str], ...]
    provenance: Provenance

    def __repr__(self) -> str:
        return (
            f"Comparison of {len(self.costs)} methods over {self.counted} of "
            f"{self.provenance.model}\n{as_text(self.best())}{self._missing()}"
        )

    @property
    def counted(self) -> str:
        """How many sentences, and how many were skipped, in words."""
        left_out = f" ({len(self.dropped)} more were skipped)" if self.dropped else ""
        return f"{self.sentences} sentences{left_out}"

    def _missing(self) -> str:
        """Returns which metrics there are none of, and why, in words."""
        missing = [metric for metric in ALIGNMENT if metric not in self.metrics]
        if not missing:
            return ""
        return f"\nNo {' and '.join(missing)}: the sentences have no cues."

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per method, layer and metric, with the method's cost."""
        import pandas

        costs = pandas.DataFrame([asdict(cost) for cost in self.costs])
        return super().to_dataframe().merge(costs, on="method", how="left")

    def best(self, metric: str | None = None) -> pandas.DataFrame:
        """Returns one row per method, at the layer where it does best, best method first.

        The best of several layers is chosen on the sentences it is measured on, and so looks a
        little better than it is; its interval does not know of the choice.

        Args:
            metric: What counts; None for the first there is (``"dot"`` where cues are known).

        Raises:
            InvalidInput: If there are no figures of this metric.
        """
        metric = self.require_metric(metric)
        frame = self.to_dataframe().drop(columns="flops")
        frame = frame[frame.metric == metric]
        frame = frame.sort_values("value", ascending=not METRICS[metric][0], kind="stable")
        return frame.drop_duplicates("method", ignore_index=True)

    def table(self, metric: str | None = None) -> pandas.DataFrame:
        """Returns methods by layers: the values of one metric; NaN where there is no such layer.

        Args:
            metric: What is shown; None for the first there is.

        Raises:
            InvalidInput: If there are no figures of this metric.
        """
        import pandas

        metric = self.require_metric(metric)
        rows = [row for row in self.rows if row.metric == metric]
        layers = sorted({row.layer for row in self.rows}, key=_layer_order)
        values = {(row.method, row.layer): row.value for row in rows}
        methods = [cost.method for cost in self.costs]
        cells = [[values.get((m, layer), float("nan")) for layer in layers] for m in methods]
        return pandas.DataFrame(cells, index=methods, columns=layers)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the summary, methods by layers for each metric, their likeness, all figures."""
        left_out = Table(
            title="Left out",
            caption="Methods that do not support this model.",
            columns=("method", "reason"),
            rows=self.left_out,
        )
        return (
            self._summary(),
            *self._behind(),
            *([left_out] if self.left_out else []),
            *self.without(),
            *(self._layers(metric) for metric in self.metrics),
            self.likeness(),
            super().panels()[0],
        )

    def _summary(self) -> Table:
        best = {metric: self.best(metric).set_index("method") for metric in self.metrics}
        costs = {cost.method: cost for cost in self.costs}
        rows = []
        for method in self.best()["method"]:
            cells: list[str | float] = [method]
            for metric in self.metrics:
                row = best[metric].loc[method]
                interval = f"{row['low']:.2f} to {row['high']:.2f}"
                cells.append(f"{row['value']:.2f} ({interval}; {row['layer']})")
            rows.append((*cells, costs[method].seconds, costs[method].forward))
        chance = ", ".join(
            f"{in_plain_words(metric)} {frame['chance'].iloc[0]:.2f}"
            for metric, frame in best.items()
        )
        known = f" The model itself prefers the right word in {self.correct} of {self.sentences}."
        known = "" if self.correct is None else known
        return Table(
            title="Every method at its best layer",
            caption=f"Value (95 % interval; layer) over {self.counted}.{known} Chance "
            f"levels: {chance}. Sufficiency is better when low. The layer is chosen on these "
            "sentences, which flatters a little. Cost is that of one sentence: seconds, and "
            f"operations over those of a forward pass.{self._missing()}",
            columns=("method", *map(in_plain_words, self.metrics), "seconds", "forward passes"),
            rows=tuple(rows),
        )

    def _behind(self) -> tuple[Table, ...]:
        """Returns how far each method is from the best one, by metric; nothing of older files."""
        if len(self.methods) < 2 or not all(row.values for row in self.rows):
            return ()
        cells: dict[str, list[str]] = {method: [] for method in self.best()["method"]}
        for metric in self.metrics:
            first = self.best(metric)["method"].iloc[0]
            found = self.difference(first, metric=metric, layer=BEST)
            cells[first].append("the best")
            for row in found.rows:
                text = f"{-row.value:+.2f} ({-row.high:.2f} to {-row.low:.2f}; p {row.p:.4f})"
                cells[row.other].append(text)
        return (
            Table(
                title="Behind the best method",
                caption="Each method less the one with the best mean, sentence by sentence (paired "
                "95 % bootstrap interval; p of a permutation test, not corrected for how many "
                "there are). Layers are chosen on all sentences but the one they are used for.",
                columns=("method", *map(in_plain_words, self.metrics)),
                rows=tuple((method, *texts) for method, texts in cells.items()),
            ),
        )

    def _layers(self, metric: str) -> Heatmap:
        frame = self.table(metric)
        better, meaning = METRICS[metric]
        return Heatmap(
            title=f"{as_heading(in_plain_words(metric))}, by method and layer",
            caption=f"{meaning} {'Higher' if better else 'Lower'} is better.",
            values=torch.tensor(frame.to_numpy())[None],
            sheets=(in_plain_words(metric),),
            rows=tuple(frame.index),
            columns=tuple(frame.columns),
            unit=in_plain_words(metric),
            axes=("method", "layer"),
        )

    def likeness(self) -> Heatmap:
        """Returns how alike the methods order the sources of the target, as a picture."""
        return Heatmap(
            title="How alike the methods are",
            caption="Spearman's correlation of the target's row between two methods, both from "
            "the input to the last layer, averaged over sentences.",
            # Of a method with itself there is nothing to say.
            values=self.alike.clone().fill_diagonal_(torch.nan)[None],
            sheets=("agreement",),
            rows=self.alike_methods,
            columns=self.alike_methods,
            unit="rank correlation",
            axes=("method", "method"),
        )

    def without(self) -> tuple[Table, ...]:
        """Returns the table of sentences that were skipped, if any were."""
        if not self.dropped:
            return ()
        return (
            Table(
                title="Sentences skipped",
                caption="The model cannot be asked about these.",
                columns=("sentence", "reason"),
                rows=self.dropped,
            ),
        )


def _layer_order(name: str) -> tuple[int, int, str]:
    """Single layers come first, then what reaches back to the input, then predictions."""
    number, _, how = name.removeprefix("input to ").partition(", ")
    if not number.isdigit():
        return 2, 0, ""
    return int(name.startswith("input")), int(number), how
