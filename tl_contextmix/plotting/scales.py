"""How deep the colour of a cell is.

Numbers of a map range over many powers of ten: on a linear scale half of the cells and more are
white. Colours therefore follow the rank of a number, and a reader may choose otherwise (`maps.js`
has the same rule); what is read out is always the number itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from tl_contextmix.plotting.display_text import decimals, number


def depths(cells: Float[torch.Tensor, "*cells"]) -> Float[torch.Tensor, "*cells"]:
    """Returns colours from -1 to 1 by rank: the share of cells that are not larger, squared.

    Zero is 0, and the sign is that of the number. Squared, a fifth of the cells are all but white
    and what is large stands out. NaN and infinities stay what they are.

    Args:
        cells: The numbers of all sheets; NaN where there is none.
    """
    sizes = cells.detach().double().abs()
    counted = sizes[sizes.isfinite() & (sizes > 0)].sort().values
    if not counted.numel():
        return cells.detach().double()
    share = torch.searchsorted(counted, sizes.contiguous(), right=True) / counted.numel()
    found = cells.detach().double().sign() * share.square()
    return torch.where(sizes.isfinite(), found, cells.detach().double())


def describe_ranks(cells: Float[torch.Tensor, "*cells"]) -> str:
    """Returns in words what the colours of `depths` stand for; nothing where there is no number."""
    sizes = cells.detach().double().abs()
    counted = sizes[sizes.isfinite() & (sizes > 0)]
    if not counted.numel():
        return ""
    half = float(counted.median())
    return f"colour by rank: half of the numbers are below {number(half, decimals(half))}"


def ends(low: float, high: float) -> tuple[str, str]:
    """Returns the numbers at the ends of a scale that is white at 0."""
    largest = max(-low, high)
    places = decimals(largest)
    return (number(-largest, places) if low < 0 else "0"), number(largest, places)
