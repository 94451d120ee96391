"""Whether a prediction falls when components are ablated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.base import Result
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens
from tl_contextmix.results.row_tables import as_text

if TYPE_CHECKING:
    import pandas

QUANTITIES = ("log_prob", "probability", "reciprocal_rank")


@storage.storable
@dataclass(frozen=True, eq=False)
class Knockout(Result):
    """A token's probability before and after components were ablated, and with random ones.

    Attributes:
        before: Log-probability, probability and reciprocal rank of the target, model as it is; with
            a foil each less the foil's.
        after: The same with the chosen components ablated.
        controls: The same with as many random ones of the same kinds ablated.
        components: What was ablated: heads and neurons, each once. Sentences may have different
            numbers of them, see `Components`.
        target: The token of each row, or alternatives.
        best: The most probable token of each sentence once they are out.
        provenance: Where the numbers come from.
        foil: What the target is contrasted with, or None.
    """

    LABELS = {"component": "components", "quantity": QUANTITIES}

    before: Float[torch.Tensor, "batch quantity"]
    after: Float[torch.Tensor, "batch quantity"]
    controls: Float[torch.Tensor, "batch control quantity"]
    components: Components
    target: Tokens
    best: Tokens
    provenance: Provenance
    foil: Tokens | None = None

    def __repr__(self) -> str:
        return f"Knockout of {self._count()} components\n{as_text(self.summary())}"

    def _count(self) -> str:
        """Returns how many were ablated in a sentence."""
        counts = (~self.components.is_empty()).sum(dim=1)
        least, most = int(counts.min()), int(counts.max())
        return str(most) if least == most else f"{least} to {most}"

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per sentence and quantity: before, after, mean over random controls."""
        import pandas

        found = []
        for row, best in enumerate(self.best.strings):
            for index, name in enumerate(QUANTITIES):
                when = {w: float(values[row, index]) for w, values in self._times().items()}
                found.append(
                    {
                        "batch": row,
                        "target": self.target.alternatives(row),
                        **({} if self.foil is None else {"foil": self.foil.alternatives(row)}),
                        "quantity": name,
                        **when,
                        "best_after": best[0],
                    }
                )
        return pandas.DataFrame(found)

    def _times(self) -> dict[str, torch.Tensor]:
        """Returns the quantities of each sentence before, after, and without random components."""
        # The mean of no controls is NaN.
        return {"before": self.before, "after": self.after, "control": self.controls.mean(dim=1)}

    def summary(self) -> pandas.DataFrame:
        """Returns the mean over sentences of each quantity, with 95 % bootstrap intervals.

        ``reciprocal_rank`` is then the MRR. Rows: before, after, control.
        """
        import pandas

        rows = []
        for index, name in enumerate(QUANTITIES):
            for when, values in self._times().items():
                column = values[:, index].detach().double().cpu()
                rows.append((name, when, float(column.mean()), *bootstrap_interval(column)))
        return pandas.DataFrame(rows, columns=["quantity", "when", "mean", "low", "high"])

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table of each sentence."""
        frame = self.to_dataframe()
        return (
            Table(
                title=f"{self._count()} components ablated",
                caption="The target before, after, and with as many random components of the same "
                f"kinds ablated (mean of {self.controls.shape[1]} draws).",
                columns=("sentence", *frame.columns[1:]),
                rows=tuple(map(tuple, frame.to_numpy().tolist())),
            ),
        )
