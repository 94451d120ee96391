"""One look at a stack of maps, a sheet at a time: all that its pictures and its texts need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

# Of a larger stack, each pixel stands for several cells.
PIXELS = 2_500_000
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
    """

    low: float
    high: float
    finite: bool
    nan: bool
    infinite: bool
    top: tuple[tuple[int, int, int, float], ...]
    block: int
    pixels: Float[torch.Tensor, "sheet row column"]

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

    Args:
        values: The maps.
        hidden: Cells that the pixels leave out.
    """
    block = max(1, math.ceil(math.sqrt(values.numel() / PIXELS)))
    low, high, nan, infinite = math.inf, -math.inf, False, False
    top: list[tuple[float, int, int, float]] = []
    pixels = []
    for place, one in enumerate(values if values.numel() else ()):
        sheet = one.detach().cpu().double()
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
        shown = sheet if hidden is None else sheet.masked_fill(hidden, math.nan)
        pixels.append(coarse(shown, block))
    width = values.shape[2]
    return Survey(
        low=low if low <= high else 0.0,
        high=high if low <= high else 0.0,
        finite=low <= high,
        nan=nan,
        infinite=infinite,
        top=tuple((place, at // width, at % width, value) for _, place, at, value in top),
        block=block,
        pixels=torch.stack(pixels) if pixels else values.detach().cpu().double(),
    )


def coarse(sheet: Float[torch.Tensor, "row column"], block: int) -> torch.Tensor:
    """Returns the number farthest from zero of each square of cells; NaN where there is none."""
    if block == 1:
        return sheet
    down, across = (math.ceil(side / block) for side in sheet.shape)
    even = sheet.new_full((down * block, across * block), math.nan)
    even[: sheet.shape[0], : sheet.shape[1]] = sheet
    missing = even.isnan()
    ends = []
    for sign in (1, -1):
        part = (sign * even).masked_fill(missing, -math.inf)
        part = part.view(down, block, across * block).amax(1).view(down, across, block).amax(-1)
        ends.append(part)
    up, lower = ends
    farthest = torch.where(up >= lower, up, -lower)
    return farthest.masked_fill((up == -math.inf) & (lower == -math.inf), math.nan)
