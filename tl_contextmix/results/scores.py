"""How well maps do, with chance levels and intervals beside every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tl_contextmix.core.statistics import bootstrap_interval, sign_flip_test
from tl_contextmix.errors import InvalidInput, did_you_mean
from tl_contextmix.results import storage
from tl_contextmix.results.row_tables import RowTable, interval

# Whether more of it is better, and what it is.
METRICS: dict[str, tuple[bool, str]] = {
    "dot": (True, "Share of the target's row that falls on the cue."),
    "average precision": (True, "How high the cue stands in the row's ranking."),
    "blank-out": (True, "Rank correlation with the fall that blanking each token causes."),
    "comprehensiveness": (True, "Fall (nats) when the highest-ranked tokens are blanked."),
    "sufficiency": (False, "Fall (nats) when only the highest-ranked tokens are kept."),
}
ALIGNMENT = ("dot", "average precision")
"""The metrics that need cues."""
BEST = "best"
"""In place of a layer: for each sentence the one that is best on all the others."""


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
        values: The figure of each sentence, NaN where it has none; empty if it was read from a file
            of an older version, which did not keep them.
    """

    method: str
    layer: str
    metric: str
    value: float
    low: float
    high: float
    chance: float
    sentences: int
    values: tuple[float, ...] = field(default=(), repr=False)


FIGURE_CELLS = {
    **{name: name for name in ("method", "layer", "metric", "value")},
    "95 % interval": interval,
    "chance": "chance",
    "n": "sentences",
}


@storage.storable
@dataclass(frozen=True)
class DifferenceRow:
    """How much more one method's figure is than another's on the same sentences.

    Attributes:
        method: The one.
        other: The other.
        layer: The layer of both (two names where these differ), or ``"best"``.
        metric: What was measured.
        value: Mean of the differences.
        low: Lower end of their 95 % bootstrap interval over sentences.
        high: Upper end.
        p: Two-sided p value of the sign-flip permutation test.
        sentences: How many sentences both have a figure of.
    """

    method: str
    other: str
    layer: str
    metric: str
    value: float
    low: float
    high: float
    p: float
    sentences: int


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Differences(RowTable):
    """Paired differences between methods.

    Attributes:
        rows: The differences.
        title: Heading.
        caption: How to read them.
    """

    ROW = DifferenceRow
    CELLS = {
        **{name: name for name in ("method", "other", "layer", "metric", "value")},
        "95 % interval": interval,
        "p": "p",
        "n": "sentences",
    }

    rows: tuple[DifferenceRow, ...]
    title: str
    caption: str


class ScoreTable(RowTable):
    """Figures of methods over sentences, between which there are differences."""

    ROW = ScoreRow
    CELLS = FIGURE_CELLS

    rows: tuple[ScoreRow, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics there are figures of."""
        return tuple(dict.fromkeys(row.metric for row in self.rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods there are figures of."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def difference(
        self,
        method: str,
        other: str | None = None,
        *,
        metric: str | None = None,
        layer: str | Sequence[str] | None = None,
    ) -> Differences:
        r"""Returns how much more one method's figure is than another's, sentence by sentence.

        With :math:`d_i` the difference in sentence ``i``: the mean :math:`\bar d`, its percentile
        bootstrap interval over sentences, and the two-sided p value of a permutation test that
        flips the sign of each :math:`d_i` (`scipy.stats.permutation_test`; all sign patterns where
        there are at most 9999, else 9999 of them). Two methods' own intervals may overlap and their
        difference still not include zero. The p values are not corrected for how many there are.

        Args:
            method: The one.
            other: The other; None: every other one in turn.
            metric: What is compared; None for the first there is. Where low values are better
                (``"sufficiency"``), the better method has the negative difference.
            layer: A layer as the rows name it, or two, of ``method`` and of ``other``. ``"best"``:
                for each sentence the layer that is best on all the others, so that the choice does
                not flatter the method with more layers. None: ``"best"`` and every layer that both
                have.

        Raises:
            InvalidInput: If there is no such method, metric or layer, a method has two figures of
                one layer, two have figures of different sentences, or the sentences' figures were
                not kept (files of older versions).
        """
        metric = self.require_metric(metric)
        one = self._values(method, metric)
        pairs = [(layer, layer)] if isinstance(layer, str) else layer and [tuple(layer)]
        rows = []
        for name in [m for m in self.methods if m != method] if other is None else [other]:
            two = self._values(name, metric)
            shared = [(n, n) for n in (BEST, *one) if n == BEST or n in two]
            for layers in pairs or shared:
                if len(layers) != 2:
                    raise InvalidInput(
                        "these are not the layers of two methods",
                        repr(layer),
                        "one layer, or two",
                        "Pass a name, or (name, name).",
                    )
                both = zip((one, two), layers, strict=True)
                a, b = (_of_layer(values, n, metric) for values, n in both)
                rows.append(_difference(method, name, metric, layers, a, b))
        return Differences(
            rows=tuple(rows),
            title=f"Differences in {metric}",
            caption="Means over sentences of one method's figure less the other's, with paired "
            "bootstrap intervals (95 %) and p values of a permutation test, not corrected for how "
            'many there are. "best": at the layer that is best on all other sentences.',
        )

    def _values(self, method: str, metric: str) -> dict[str, Tensor]:
        """Returns the figures of each sentence, by layer."""
        rows = [row for row in self.rows if (row.method, row.metric) == (method, metric)]
        if not rows:
            raise InvalidInput(
                "there are no figures of this method",
                repr(method),
                f"one of {list(self.methods)}",
                did_you_mean(method, self.methods) or "Compare it, too.",
            )
        result = {row.layer: torch.tensor(row.values, dtype=torch.float64) for row in rows}
        if len(result) < len(rows) or not all(len(values) for values in result.values()):
            several = len(result) < len(rows)
            raise InvalidInput(
                "figures cannot be compared sentence by sentence",
                f"two figures of {method!r} for one layer" if several else "means alone",
                "figures of each sentence, one for each method and layer",
                "Give the methods names of their own, such as method= of cue_alignment."
                if several
                else "Compute them again: files of older versions did not keep these.",
            )
        return result

    def require_metric(self, metric: str | None) -> str:
        """Returns a metric there are figures of: the first one for None.

        Raises:
            InvalidInput: If there are none.
        """
        if metric is None:
            return self.metrics[0]
        if metric not in self.metrics:
            raise InvalidInput(
                "there are no figures of this metric",
                repr(metric),
                f"one of {list(self.metrics)}",
                "Alignment with cues needs cues; see compare.",
            )
        return metric


def _of_layer(values: dict[str, Tensor], layer: str, metric: str) -> Tensor:
    if layer in values:
        return values[layer]
    if layer != BEST:
        raise InvalidInput(
            "there are no figures of this layer",
            repr(layer),
            f"one of {[*values]}, or {BEST!r}",
            "Pass a layer as the table names it.",
        )
    table = torch.stack([*values.values()])
    known = ~table.isnan()
    # Means over all sentences but each one.
    kept = table.nan_to_num(0.0)
    means = (kept.sum(1, keepdim=True) - kept) / (known.sum(1, keepdim=True) - known.int())
    worst = -torch.inf if METRICS.get(metric, (True, ""))[0] else torch.inf
    means = torch.where(means.isfinite(), means, worst)
    chosen = means.argmax(0) if worst < 0 else means.argmin(0)
    return table.gather(0, chosen[None])[0]


def _difference(
    method: str, other: str, metric: str, layers: Sequence[str], a: Tensor, b: Tensor
) -> DifferenceRow:
    if len(a) != len(b):
        raise InvalidInput(
            "figures of different sentences cannot be paired",
            f"{len(a)} sentences of {method!r} and {len(b)} of {other!r}",
            "equally many",
            "Run both on the same sentences.",
        )
    apart = (a - b)[~(a - b).isnan()]
    low, high = bootstrap_interval(apart)
    name = layers[0] if layers[0] == layers[1] else " / ".join(layers)
    mean, p = float(apart.mean()), sign_flip_test(apart)
    return DifferenceRow(method, other, name, metric, mean, low, high, p, len(apart))


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Score(ScoreTable):
    """Figures about one map or several.

    Attributes:
        rows: The figures.
        title: Heading.
        caption: How to read them.
    """

    rows: tuple[ScoreRow, ...]
    title: str
    caption: str

    def __add__(self, other: Score) -> Score:
        """Returns the figures of both, under this one's heading."""
        return self._joined(other)
