"""Results of the identity check."""

from __future__ import annotations

from dataclasses import dataclass

from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results import storage
from tl_contextmix.results.row_tables import RowTable

HUGGING_FACE = "logits = Hugging Face's"
"""The identity of a bridge with the model that it holds."""


@storage.storable
@dataclass(frozen=True)
class CheckRow:
    """One identity at one place.

    Attributes:
        identity: What must be equal, for example ``"pattern @ v = z"``.
        where: Block or sublayer.
        error: Largest difference, relative to the size of the compared values.
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
        """The error divided by the tolerance; infinite for NaN."""
        return self.error / self.tolerance if self.error == self.error else float("inf")


@storage.storable
@dataclass(frozen=True)
class IdentityReport(RowTable):
    """How well a view reproduces its model.

    Attributes:
        model: The model's name and host.
        rows: One per identity and place.
        limits: What is unavailable for this model although the identities hold, with reasons.
        cause: Why the model's own numbers are not finite; empty where they are.
        hooked: Where hooks of your own are, or SAEs: the identities are of the model without them.
            What they do to a pass is checked in the pass.
    """

    ROW = CheckRow
    COMPUTED = ("ok",)
    CELLS = {
        "identity": "identity",
        "where": "where",
        "error": lambda row: f"{row.error:.1e}",
        "tolerance": lambda row: f"{row.tolerance:.0e}",
        "holds": lambda row: "yes" if row.ok else "NO",
    }
    CAPTION = (
        "Quantities recomputed from a few hooks against the model's own; errors are relative to "
        "the size of the compared values."
    )

    model: str
    rows: tuple[CheckRow, ...]
    limits: tuple[str, ...] = ()
    cause: str = ""
    hooked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every identity holds."""
        return all(row.ok for row in self.rows)

    def worst(self) -> CheckRow:
        """Returns the row with the largest error relative to its tolerance."""
        return max(self.rows, key=lambda row: row.excess)

    def __repr__(self) -> str:
        lines = [f"{self.model}: {'every identity holds' if self.ok else 'FAILED'}"]
        lines += [
            f"  {'ok  ' if row.ok else 'FAIL'} {row.error:8.1e} <= {row.tolerance:.0e}  "
            f"{row.where:28} {row.identity}"
            for row in self.rows
        ]
        lines += [f"  cause: {self.cause}"] if self.cause else []
        lines += [f"  unavailable: {limit}" for limit in self.limits]
        return "\n".join([*lines, *(f"  {line}" for line in self._seen())])

    def _seen(self) -> list[str]:
        """Returns what was looked at, where that is not the model with all that is on it."""
        if not self.hooked:
            return []
        return [
            f"looked at without your hooks at {', '.join(self.hooked)}: what they edit is checked "
            "in each pass, by what each method needs of it."
        ]

    def _caption(self) -> str:
        seen = [line[0].upper() + line[1:] for line in self._seen()]
        cause = [f"Cause: {self.cause}"] if self.cause else []
        limits = [f"Unavailable: {limit}" for limit in self.limits]
        return " ".join([self.CAPTION, *cause, *limits, *seen])

    def _title(self) -> str:
        return f"Identity check of {self.model}"


def require_identities(report: IdentityReport) -> None:
    """Checks that every identity holds.

    Raises:
        InvalidInput: If the model's own numbers are not finite; the message says why.
        UnsupportedModel: If one does not; the message has place, error, tolerance and advice.
    """
    if report.ok:
        return
    if report.cause:
        raise InvalidInput(report.cause)
    worst = report.worst()
    if worst.identity == HUGGING_FACE:
        raise UnsupportedModel(
            f"{report.model} does not compute what the Hugging Face model that it holds does",
            f"a relative error of {worst.error:.2g} against the logits of {worst.where}",
            f"at most {worst.tolerance:.0e}",
            "TransformerLens reads this architecture, or this configuration of it, wrongly, or "
            "modules of the bridge were replaced. Load it anew, under its own architecture, or "
            "with another version of TransformerLens.",
        )
    failed = sum(not row.ok for row in report.rows)
    raise UnsupportedModel(
        f"{report.model} is not read correctly: {worst.identity} fails in {worst.where}",
        f"a relative error of {worst.error:.2g} ({failed} of {len(report.rows)} identities fail)",
        f"at most {worst.tolerance:.0e}",
        "TransformerLens' hooks may not show what the model computes, or its blocks may be "
        "unsupported. See tl_contextmix.check(model), and try another class or version of "
        "TransformerLens.",
    )
