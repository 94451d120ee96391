"""What several sections of the report draw and say alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap, LayerFigures


def shares(map: ContextMap, title: str, caption: str) -> Heatmap:
    """Returns the picture of a map whose rows are divided by their sums."""
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
    """Returns one sheet of named rows over tokens."""
    return Heatmap(
        title=title,
        caption=caption,
        values=values[None].detach().cpu(),
        sheets=(title,),
        rows=tuple(rows),
        columns=tuple(columns),
        unit=unit,
    )


def layer_names(layers: Sequence[int]) -> tuple[str, ...]:
    """Returns a name for each layer."""
    return tuple(f"layer {layer}" for layer in layers)


def only(figures: LayerFigures, quantities: tuple[str, ...]) -> LayerFigures:
    """Returns some of the quantities, for those on one scale to share a chart."""
    places = [figures.quantities.index(name) for name in quantities]
    return replace(figures, values=figures.values[:, :, places], quantities=quantities)


def largest(values: torch.Tensor, leave_out: int | None = None) -> tuple[int, int]:
    """Returns row and column of the largest number; NaN and one column may be left out."""
    kept = values.detach().cpu().nan_to_num(-1.0).clone()
    if leave_out is not None and kept.shape[1] > 1:
        kept[:, leave_out] = -1.0
    return divmod(int(kept.argmax()), kept.shape[1])


def quoted(token: str) -> str:
    """Returns a token in quotation marks, without the space in front of it."""
    return f"“{token.strip() or token}”"
