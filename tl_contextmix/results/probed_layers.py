"""How easily labels can be read from a model's activations, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.statistics import spearman, t_quantile
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.comparison import Comparison
from tl_contextmix.results.curves import CurvePoint, LayerCurves
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.scores import METRICS, Score, ScoreRow

COMPRESSION = "compression"


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Probing(LabelledArray):
    """How well probes read labels from the activations at some points of each layer.

    Attributes:
        bits: Length of the online code of the labels.
        control_bits: That of the control labels.
        accuracy: Of the last probe, trained on the first half of the texts, on the other half.
        control_accuracy: The same with control labels.
        points: The points of a block.
        layers: Number of each layer.
        classes: Name of each class.
        counts: How many texts are of each class.
        provenance: Where the numbers come from.
    """

    LABELS = {"point": "points", "layer": "layers"}
    COLUMNS = {
        COMPRESSION: COMPRESSION,
        "bits": "bits",
        "accuracy": "accuracy",
        "selectivity": "selectivity",
        "control_bits": "control_bits",
        "control_accuracy": "control_accuracy",
    }

    bits: Float[torch.Tensor, "seed point layer"]
    control_bits: Float[torch.Tensor, "seed point layer"]
    accuracy: Float[torch.Tensor, "seed point layer"]
    control_accuracy: Float[torch.Tensor, "seed point layer"]
    points: tuple[str, ...]
    layers: tuple[int, ...]
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    provenance: Provenance

    @property
    def uniform_bits(self) -> float:
        """Length of a code that knows how many classes there are, and nothing else."""
        return sum(self.counts) * math.log2(len(self.classes))

    @property
    def compression(self) -> Float[torch.Tensor, "seed point layer"]:
        """How many times shorter than the uniform code the online code is."""
        return self.uniform_bits / self.bits

    @property
    def selectivity(self) -> Float[torch.Tensor, "seed point layer"]:
        """Accuracy less that with control labels (Hewitt & Liang 2019)."""
        return self.accuracy - self.control_accuracy

    @property
    def majority(self) -> float:
        """Accuracy of the most frequent class."""
        return max(self.counts) / sum(self.counts)

    def curves(self) -> LayerCurves:
        """Returns means over seeds with their 95 % intervals (Student's t), by point and layer.

        The intervals say how much orders of the texts and first weights matter, not how much the
        texts do, which are the same for every seed.
        """
        return LayerCurves(
            points=tuple(
                point
                for metric, values in self._figures().items()
                for point in self._points(metric, values)
            ),
            title="Probing",
            caption=f"{sum(self.counts)} texts, {len(self.classes)} classes; the uniform code "
            f"takes {self.uniform_bits:.0f} bits, the most frequent class is right on "
            f"{self.majority:.3f}. Means and 95 % intervals over {len(self.bits)} seeds.",
            provenance=self.provenance,
        )

    def _figures(self) -> dict[str, Tensor]:
        return {
            COMPRESSION: self.compression,
            "compression of control labels": self.uniform_bits / self.control_bits,
            "bits": self.bits,
            "accuracy": self.accuracy,
            "selectivity": self.selectivity,
        }

    def _points(self, metric: str, values: Tensor) -> list[CurvePoint]:
        values = values.detach().cpu().double()
        seeds, mean = len(values), values.mean(0)
        spread = values.std(0) if seeds > 1 else torch.full_like(mean, torch.nan)
        reach = t_quantile(seeds - 1) * spread / math.sqrt(seeds)
        return [
            CurvePoint(
                metric,
                point,
                layer,
                float(mean[row, column]),
                float(mean[row, column] - reach[row, column]),
                float(mean[row, column] + reach[row, column]),
                sum(self.counts),
            )
            for row, point in enumerate(self.points)
            for column, layer in enumerate(self.layers)
        ]

    def panels(self) -> tuple[Panel, ...]:
        """Returns a chart of each figure by layer, and the table with intervals."""
        return self.curves().panels()

    def beside(self, comparison: Comparison | Score, metric: str | None = None) -> ProbedMaps:
        """Returns the curve of each method of a comparison by layer beside the probe's.

        What a layer's probe reads and what that layer's map shows belong together where the label
        has to come from the tokens that the maps are scored on (Mohebbi et al. 2023).

        Args:
            comparison: Of the same model and sentences, see `tl_contextmix.compare`; or figures
                such as those of `cue_alignment`.
            metric: Which figure of the maps; None for the first there is (``"dot"`` where cues are
                known).

        Returns:
            `ProbedMaps`. A method without a map of single layers (DecompX) is shown from the input
            to each layer; one without any layers (gradients) has no curve, and is named.

        Raises:
            InvalidInput: If the comparison has no such metric.
        """
        metric = comparison.require_metric(metric)
        points = self._points(COMPRESSION, self.compression)
        missing = []
        for method in comparison.methods:
            rows = [r for r in comparison.rows if (r.method, r.metric) == (method, metric)]
            curve = _curve(rows, str.isdigit) or _curve(
                rows, lambda name: name.removeprefix("input to ").isdigit()
            )
            points += [point for point in curve if point.layer in self.layers]
            missing += [] if curve else [method]
        without = f" Without layers: {', '.join(missing)}." if missing else ""
        return ProbedMaps(
            points=tuple(points),
            title="Maps beside probes",
            caption=f"{METRICS[metric][1]} 95 % intervals: of compression over seeds, of maps over "
            f"sentences.{without}",
            provenance=getattr(comparison, "provenance", self.provenance),
        )


def _curve(rows: list[ScoreRow], wanted: Callable[[str], bool]) -> list[CurvePoint]:
    return [
        CurvePoint(
            r.metric, r.method, int(r.layer.split()[-1]), r.value, r.low, r.high, r.sentences
        )
        for r in rows
        if wanted(r.layer)
    ]


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class ProbedMaps(LayerCurves):
    """How maps score in each layer, beside how much probes compress a label there."""

    def correlations(self) -> dict[tuple[str, str], float]:
        """Returns Spearman's correlation over layers of each method with each probed point."""
        probes, maps = self._by_name(True), self._by_name(False)
        result = {}
        for method, curve in maps.items():
            for point, probe in probes.items():
                shared = sorted(set(curve) & set(probe))
                a, b = (torch.tensor([one[n] for n in shared]).double() for one in (curve, probe))
                result[method, point] = float(spearman(a, b)) if shared else float("nan")
        return result

    def _by_name(self, probed: bool) -> dict[str, dict[int, float]]:
        result: dict[str, dict[int, float]] = {}
        for one in self.points:
            if (one.metric == COMPRESSION) == probed:
                result.setdefault(one.category, {})[one.layer] = one.value
        return result

    def panels(self) -> tuple[Panel, ...]:
        """Returns probes and maps by layer in one table, then charts and intervals."""
        probes, maps = self._by_name(True), self._by_name(False)
        layers = sorted({point.layer for point in self.points})
        correlations = self.correlations()

        def cells(curve: dict[int, float]) -> list[float]:
            return [curve.get(layer, float("nan")) for layer in layers]

        rows: list[tuple[str | float, ...]] = [
            (f"{COMPRESSION}, {name}", *cells(curve), *[""] * len(probes))
            for name, curve in probes.items()
        ]
        rows += [
            (name, *cells(curve), *(correlations[name, point] for point in probes))
            for name, curve in maps.items()
        ]
        table = Table(
            title=f"{self.title}, by layer",
            caption=f"{self.caption} On the right Spearman's correlation of each curve with the "
            f"probe's over {len(layers)} layers.",
            columns=(
                "",
                *(f"layer {layer}" for layer in layers),
                *(f"rank correlation, {point}" for point in probes),
            ),
            rows=tuple(rows),
        )
        return (table, *super().panels())
