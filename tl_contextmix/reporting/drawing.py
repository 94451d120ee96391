"""Helpers shared by the report's sections."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap


def shares(map: ContextMap, title: str, caption: str) -> Heatmap:
    """Returns a heatmap of the row-normalized map."""
    panel = map.normalize().panels()[0]
    assert isinstance(panel, Heatmap)
    caption = f"{caption} Each row is divided by its sum."
    return replace(panel, title=title, caption=caption, unit="share of row")


def table_of(
    values: torch.Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    caption: str,
    unit: str,
) -> Heatmap:
    """Returns a heatmap of named rows over tokens."""
    return Heatmap(
        title=title,
        caption=caption,
        values=values[None].detach().cpu(),
        sheets=(title,),
        rows=tuple(rows),
        columns=tuple(columns),
        unit=unit,
        tokens=("columns",),
    )


def stands_out(values: Sequence[float]) -> int | None:
    """Returns the place of the number that stands out of a list, or None if none does.

    It is larger than the mean of the others by three of their standard deviations, and larger than
    the next by half of it at least.
    """
    finite = [(value, place) for place, value in enumerate(values) if math.isfinite(value)]
    if len(finite) < 2:
        return finite[0][1] if finite else None
    (top, place), *others = sorted(finite, reverse=True)
    rest = [value for value, _ in others]
    spread = statistics.pstdev(rest)
    clear = top > statistics.fmean(rest) + 3 * spread and top > 1.5 * rest[0]
    return place if clear else None


def largest(values: torch.Tensor, skip: int | None = None) -> tuple[int, int]:
    """Returns row and column of the largest number, ignoring NaN and, optionally, a column."""
    kept = values.detach().cpu().nan_to_num(-1.0).clone()
    if skip is not None and kept.shape[1] > 1:
        kept[:, skip] = -1.0
    return divmod(int(kept.argmax()), kept.shape[1])


def quoted_at(tokens: Sequence[str], place: int) -> str:
    """Returns a token of a sentence in quotation marks, with its position if it is there twice."""
    here = quoted(tokens[place])
    return here if [*map(quoted, tokens)].count(here) == 1 else f"{here} ({place})"


def quoted(token: str) -> str:
    """Returns a token in quotation marks, without its leading space."""
    return f"“{token.strip() or token}”"
