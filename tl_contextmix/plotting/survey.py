"""One look at a stack of maps, a sheet at a time: all that its pictures and its texts need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch.nn.functional import max_pool2d

# Of a larger stack, each pixel stands for several cells.
PIXELS = 1_000_000
TOP_CELLS = 10


@dataclass(frozen=True)
class Survey:
    """What a stack of maps holds.

    Attributes:
        low: Lowest finite number; 0 if there is none.
        high: Highest finite number; 0 if there is none.
        finite: Whether any number is finite.
        nan: Whether there is NaN.
        infinite: Whether there is an infinity.
        top: Sheet, row, column and value of the numbers farthest from zero, farthest first.
        block: How many cells along each axis a pixel stands for.
        pixels: The number farthest from zero of each block; NaN where there is none.
        hidden: Blocks whose cells are all hidden; None: none can be.
    """

    low: float
    high: float
    finite: bool
    nan: bool
    infinite: bool
    top: tuple[tuple[int, int, int, float], ...]
    block: int
    pixels: Float[torch.Tensor, "sheet row column"]
    hidden: Bool[torch.Tensor, "row column"] | None = None

    @property
    def largest(self) -> float:
        """The absolute value with the deepest colour."""
        return max(-self.low, self.high)

    @property
    def signed(self) -> bool:
        """Whether there are numbers below zero; white is then the middle of the scale."""
        return self.low < 0


def survey(
    values: Float[torch.Tensor, "sheet row column"],
    hidden: Bool[torch.Tensor, "row column"] | None = None,
) -> Survey:
    """Looks through a stack of maps once, with the memory of one sheet.

    Hidden cells are zero, and the pixels leave them out.
    """
    block = max(1, math.ceil(math.sqrt(values.numel() / PIXELS)))
    low, high, nan, infinite = math.inf, -math.inf, False, False
    top: list[tuple[float, int, int, float]] = []
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    sheets, *sides = values.shape
    # In one piece: small results kept between the sheets would leave holes of a sheet in memory.
    pixels = torch.zeros(sheets, *(math.ceil(side / block) for side in sides), dtype=kind)
    for place in range(sheets if values.numel() else 0):
        sheet = values[place].detach().to("cpu", kind)
        least, most = map(float, sheet.aminmax())
        sizes = sheet.abs()
        if not math.isfinite(least) or not math.isfinite(most):
            nan |= math.isnan(least)
            infinite |= bool(sheet.isinf().any())
            finite = sheet[sheet.isfinite()]
            least, most = map(float, finite.aminmax()) if finite.numel() else (low, high)
            sizes = sizes.nan_to_num(nan=-1.0, posinf=math.inf)
        low, high = min(low, least), max(high, most)
        if len(top) < TOP_CELLS or infinite or max(-least, most) > -top[-1][0]:
            found = sizes.flatten().topk(min(TOP_CELLS, sizes.numel()))
            pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
            flat = sheet.flatten()
            top += [(-size, place, at, float(flat[at])) for size, at in pairs if size >= 0]
            top = sorted(top)[:TOP_CELLS]
        pixels[place] = coarse(sheet, block)
    covered = None
    if hidden is not None and values.numel():
        covered = -_highest(-hidden.float(), block) > 0
        pixels.masked_fill_(covered, math.nan)
    return Survey(
        low=low if low <= high else 0.0,
        high=high if low <= high else 0.0,
        finite=low <= high,
        nan=nan,
        infinite=infinite,
        top=tuple((place, *divmod(at, sides[1]), value) for _, place, at, value in top),
        block=block,
        pixels=pixels,
        hidden=covered,
    )


def coarse(sheet: Float[torch.Tensor, "row column"], block: int) -> torch.Tensor:
    """Returns the number farthest from zero of each square of cells; NaN where there is none."""
    if block == 1:
        return sheet
    least = sheet.amin()
    if least.isnan():
        nothing = -_highest(-sheet.isnan().float(), block) > 0
        kept = sheet.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        return coarse(kept, block).masked_fill(nothing, math.nan)
    most = _highest(sheet, block)
    if least >= 0:
        return most
    lowest = -_highest(-sheet, block)
    return torch.where(most >= -lowest, most, lowest)


def _highest(sheet: torch.Tensor, block: int) -> torch.Tensor:
    """Returns the highest number of each square of cells."""
    return max_pool2d(sheet[None], block, ceil_mode=True)[0]
