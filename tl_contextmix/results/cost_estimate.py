"""What a question would take."""

from __future__ import annotations

from dataclasses import dataclass

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import RowTable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@storage.storable
@dataclass(frozen=True)
class EstimatePart:
    """One part of what a question would take.

    Attributes:
        name: What it is.
        flops: Operations in products of matrices; a multiplication with an addition counts two.
        bytes: Bytes that it holds when most are held.
    """

    name: str
    flops: int
    bytes: int


@storage.storable
@dataclass(frozen=True, eq=False)
class Estimate(RowTable):
    """Operations and memory of a call, estimated before it runs.

    Attributes:
        method: What would be asked.
        batch: Number of sentences.
        n_tokens: Tokens of each.
        n_decoder_tokens: Tokens of each decoder input; 0 where none is given.
        flops: Operations in products of matrices, the model's own passes included.
        peak_bytes: The most bytes of tensors alive at once, the model's weights not counted.
        passes: How often the model would be run; 0 where that was not seen apart.
        parts: Where these come from; their operations add up, and so do their bytes.
        provenance: Where the numbers come from.
    """

    ROW = EstimatePart
    ROWS = "parts"

    method: str
    batch: int
    n_tokens: int
    n_decoder_tokens: int
    flops: int
    peak_bytes: int
    passes: int
    parts: tuple[EstimatePart, ...]
    provenance: Provenance

    def __repr__(self) -> str:
        return (
            f"Estimate of {self.method} on {self.batch} x {self._tokens()} tokens: "
            f"{self.flops:.2e} FLOPs, {_bytes(self.peak_bytes)} at most"
        )

    def _tokens(self) -> str:
        both = self.n_tokens, self.n_decoder_tokens
        return " + ".join(str(count) for count in both if count)

    def panels(self) -> tuple[Panel, ...]:
        """Returns the table of the parts."""
        rows = [(part.name, f"{part.flops:.2e}", _bytes(part.bytes)) for part in self.parts]
        return (
            Table(
                title=f"What {self.method} would take",
                caption=f"{self.batch} x {self._tokens()} tokens; nothing was computed. FLOPs "
                "(floating-point operations) in "
                "products of matrices; bytes when most are held, weights not counted.",
                columns=("part", "FLOPs", "bytes"),
                rows=(*rows, ("in all", f"{self.flops:.2e}", _bytes(self.peak_bytes))),
            ),
        )


def _bytes(count: int) -> str:
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"
