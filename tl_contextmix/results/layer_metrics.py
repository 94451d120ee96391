"""A few numbers per layer, or per token and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Bars, ColoredText, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, require_shape
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False)
class LayerFigures(Result):
    """A few numbers per layer.

    Attributes:
        values: The numbers; NaN where there is none.
        layers: Number of each layer.
        quantities: Name of each number.
        title: Heading.
        caption: How to read them.
        unit: What they measure.
        provenance: Where they come from.
    """

    values: Float[torch.Tensor, "batch layer quantity"]
    layers: tuple[int, ...]
    quantities: tuple[str, ...]
    title: str
    caption: str
    unit: str
    provenance: Provenance

    def __post_init__(self) -> None:
        shape = (self.values.shape[0], len(self.layers), len(self.quantities))
        require_shape("LayerFigures.values", self.values, shape)

    def __repr__(self) -> str:
        return (
            f"LayerFigures {self.title!r}: batch {self.values.shape[0]}, "
            f"layer {len(self.layers)}, quantity {', '.join(self.quantities)}"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per batch row, layer and quantity, NaN included."""
        import numpy as np
        import pandas

        batch, layer, quantity = np.indices(self.values.shape).reshape(3, -1)
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "quantity": np.array(self.quantities, dtype=object)[quantity],
                "value": as_array(self.values).reshape(-1),
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns one bar chart per sentence."""
        labels = tuple(f"layer {layer}" for layer in self.layers)
        return tuple(
            Bars(
                title=self.title,
                caption=self.caption,
                labels=labels,
                series=tuple(
                    (name, tuple(values[:, index].tolist()))
                    for index, name in enumerate(self.quantities)
                ),
                unit=self.unit,
            )
            for values in self.values.detach().cpu()
        )


@storage.storable
@dataclass(frozen=True, eq=False)
class TokenFigures(Result):
    """One number per token and layer.

    Attributes:
        values: The numbers; 0 at padding.
        layers: Number of each layer.
        tokens: The tokens.
        title: Heading.
        caption: How to read them.
        unit: What they measure.
        provenance: Where they come from.
    """

    values: Float[torch.Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    tokens: Tokens
    title: str
    caption: str
    unit: str
    provenance: Provenance

    def __post_init__(self) -> None:
        batch, pos = self.tokens.ids.shape
        require_shape("TokenFigures.values", self.values, (batch, len(self.layers), pos))

    def __repr__(self) -> str:
        batch, layer, pos = self.values.shape
        return f"TokenFigures {self.title!r}: batch {batch}, layer {layer}, pos {pos}"

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per token and layer; positions that are padding are left out."""
        import numpy as np
        import pandas

        real = self.tokens.mask.cpu()[:, None].expand(self.values.shape).numpy()
        batch, layer, pos = np.nonzero(real)
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "pos": pos,
                "token": np.array(self.tokens.strings, dtype=object)[batch, pos],
                "value": as_array(self.values)[real],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns the coloured sentence, once per layer; padding is left out."""
        found = []
        for row, strings in enumerate(self.tokens.strings):
            real = self.tokens.mask[row].cpu()
            words = tuple(word for word, keep in zip(strings, real.tolist(), strict=True) if keep)
            for index, layer in enumerate(self.layers):
                values = self.values[row, index].detach().cpu()[real]
                title = f"{self.title}, layer {layer}"
                found.append(
                    ColoredText(title, self.caption, words, tuple(values.tolist()), self.unit)
                )
        return tuple(found)
