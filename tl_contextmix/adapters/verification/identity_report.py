"""What the identity check found, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_contextmix.errors import UnsupportedModel, four_parts
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import Result, storage

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True)
class CheckRow:
    """One identity at one place.

    Attributes:
        identity: What must be equal, for example ``"pattern @ v = z"``.
        where: Block or sublayer.
        error: Largest difference, relative to the size of what is compared.
        tolerance: The bound.
    """

    identity: str
    where: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the identity holds. A NaN error does not."""
        return self.error <= self.tolerance

    @property
    def excess(self) -> float:
        """How many times the bound the error is; infinite for NaN."""
        return self.error / self.tolerance if self.error == self.error else float("inf")


@storage.storable
@dataclass(frozen=True)
class IdentityReport(Result):
    """How well a view reproduces its model.

    Attributes:
        model: The model's name and host.
        rows: One per identity and place.
        limits: What is not answered for this model although the identities hold, with the reason.
    """

    model: str
    rows: tuple[CheckRow, ...]
    limits: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every identity holds."""
        return all(row.ok for row in self.rows)

    def worst(self) -> CheckRow:
        """Returns the row furthest beyond (or nearest to) its tolerance."""
        return max(self.rows, key=lambda row: row.excess)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per identity and place."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "identity": row.identity,
                    "where": row.where,
                    "error": row.error,
                    "tolerance": row.tolerance,
                    "ok": row.ok,
                }
                for row in self.rows
            ]
        )

    def __repr__(self) -> str:
        lines = [f"{self.model}: {'every identity holds' if self.ok else 'FAILED'}"]
        lines += [
            f"  {'ok  ' if row.ok else 'FAIL'} {row.error:8.1e} <= {row.tolerance:.0e}  "
            f"{row.where:28} {row.identity}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"  not answered: {limit}" for limit in self.limits)])

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table."""
        caption = (
            "Every quantity is recomputed from a few hooks and compared with the model's own; "
            "errors are relative to the size of what is compared."
        )
        return (
            Table(
                title=f"Identity check of {self.model}",
                caption=" ".join([caption, *(f"Not answered: {limit}" for limit in self.limits)]),
                columns=("identity", "where", "error", "tolerance", "holds"),
                rows=tuple(
                    (
                        row.identity,
                        row.where,
                        f"{row.error:.1e}",
                        f"{row.tolerance:.0e}",
                        "yes" if row.ok else "NO",
                    )
                    for row in self.rows
                ),
            ),
        )


def require_identities(report: IdentityReport) -> None:
    """Checks that every identity holds.

    Raises:
        UnsupportedModel: If one does not, naming place, error, tolerance and what to do.
    """
    if report.ok:
        return
    worst = report.worst()
    failed = sum(not row.ok for row in report.rows)
    raise UnsupportedModel(
        four_parts(
            f"{report.model} is not read correctly: {worst.identity} fails in {worst.where}",
            f"a relative error of {worst.error:.2g} ({failed} of {len(report.rows)} identities "
            "fail)",
            f"at most {worst.tolerance:.0e}",
            "Either this TransformerLens shows the model otherwise than it computes it, or its "
            "blocks are of a kind that is not supported. tl_contextmix.check(model) shows every "
            "identity; another class or version of TransformerLens may read it right.",
        )
    )
