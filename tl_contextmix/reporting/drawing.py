"""Helpers shared by the report's sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap, LayerFigures


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
    )


def layer_names(layers: Sequence[int]) -> tuple[str, ...]:
    """Returns a name for each layer."""
    return tuple(f"layer {layer}" for layer in layers)


def only(figures: LayerFigures, quantities: tuple[str, ...]) -> LayerFigures:
    """Returns some of the quantities, so that those on one scale share a chart."""
    places = [figures.quantities.index(name) for name in quantities]
    return replace(figures, values=figures.values[:, :, places], quantities=quantities)


def largest(values: torch.Tensor, skip: int | None = None) -> tuple[int, int]:
    """Returns row and column of the largest number, ignoring NaN and, optionally, a column."""
    kept = values.detach().cpu().nan_to_num(-1.0).clone()
    if skip is not None and kept.shape[1] > 1:
        kept[:, skip] = -1.0
    return divmod(int(kept.argmax()), kept.shape[1])


def quoted(token: str) -> str:
    """Returns a token in quotation marks, without its leading space."""
    return f"“{token.strip() or token}”"
