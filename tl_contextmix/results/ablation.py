"""Whether a prediction falls when components are taken out of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import require_shape
from tl_contextmix.results.base import Result
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas

QUANTITIES = ("log_prob", "probability", "reciprocal_rank")


@storage.storable
@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """A token's probability before and after components were taken out, and with random ones.

    Attributes:
        before: Log-probability, probability and reciprocal rank of the target, model as it is.
        after: The same with the chosen components taken out.
        controls: The same with as many random ones of the same kinds taken out.
        components: What was taken out: heads and neurons, each once. Sentences may have different
            numbers of them, see `Components`.
        target: The token of each sentence.
        best: The most probable token of each sentence once they are out.
        provenance: Where the numbers come from.
    """

    before: Float[torch.Tensor, "batch quantity"]
    after: Float[torch.Tensor, "batch quantity"]
    controls: Float[torch.Tensor, "batch control quantity"]
    components: Components
    target: Tokens
    best: Tokens
    provenance: Provenance

    def __post_init__(self) -> None:
        batch = self.target.ids.shape[0]
        expected = (batch, len(QUANTITIES))
        require_shape("Knockout.before", self.before, expected)
        require_shape("Knockout.after", self.after, expected)
        count = self.controls.shape[1]
        require_shape("Knockout.controls", self.controls, (batch, count, len(QUANTITIES)))
        require_shape("Knockout.components", self.components.kind[:, :1], (batch, 1))

    def __repr__(self) -> str:
        frame = self.summary().round(3).to_string(index=False)
        return f"Knockout of {self._count()} components\n{frame}"

    def _count(self) -> str:
        """Returns how many were taken out of a sentence."""
        counts = (~self.components.is_empty()).sum(dim=1)
        least, most = int(counts.min()), int(counts.max())
        return str(most) if least == most else f"{least} to {most}"

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per sentence and quantity: before, after, mean over random controls."""
        import pandas

        middle = _means(self.controls)
        return pandas.DataFrame(
            [
                {
                    "batch": row,
                    "target": self.target.strings[row][0],
                    "quantity": name,
                    "before": float(self.before[row, index]),
                    "after": float(self.after[row, index]),
                    "control": float(middle[row, index]),
                    "best_after": self.best.strings[row][0],
                }
                for row in range(len(self.before))
                for index, name in enumerate(QUANTITIES)
            ]
        )

    def summary(self) -> pandas.DataFrame:
        """Returns the mean over sentences of each quantity, with 95 % bootstrap intervals.

        ``reciprocal_rank`` is then the MRR. Rows: before, after, control.
        """
        import pandas

        rows = []
        for index, name in enumerate(QUANTITIES):
            for when, values in (
                ("before", self.before),
                ("after", self.after),
                ("control", _means(self.controls)),
            ):
                column = values[:, index].detach().double().cpu()
                low, high = bootstrap_interval(column)
                rows.append(
                    {
                        "quantity": name,
                        "when": when,
                        "mean": float(column.mean()),
                        "low": low,
                        "high": high,
                    }
                )
        return pandas.DataFrame(rows)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table of each sentence."""
        frame = self.to_dataframe()
        return (
            Table(
                title=f"{self._count()} components taken out",
                caption="The target before, after, and with as many random components of the same "
                f"kinds taken out (mean of {self.controls.shape[1]} draws).",
                columns=("sentence", *frame.columns[1:]),
                rows=tuple(map(tuple, frame.to_numpy().tolist())),
            ),
        )


def _means(controls: Float[torch.Tensor, "batch control quantity"]) -> torch.Tensor:
    """Returns the mean over controls; NaN where there are none."""
    return controls.mean(dim=1)
