"""A few numbers per layer, or per token and layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Bars, ColoredText, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class LayerFigures(LabelledArray):
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

    LABELS = {"layer": "layers", "quantity": "quantities"}
    COLUMNS = {"value": "values"}
    SUBTRACTED = ("values",)
    BY_SIZE = True

    values: Float[torch.Tensor, "batch layer quantity"]
    layers: tuple[int, ...]
    quantities: tuple[str, ...]
    title: str
    caption: str
    unit: str
    provenance: Provenance

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
                axis="layer",
            )
            for values in self.values.detach().cpu()
        )


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class TokenFigures(LabelledArray):
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

    LABELS = {"layer": "layers", "pos": "tokens"}
    COLUMNS = {"value": "values"}
    SUBTRACTED = ("values",)
    BY_SIZE = True

    values: Float[torch.Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    tokens: Tokens
    title: str
    caption: str
    unit: str
    provenance: Provenance

    def panels(self) -> tuple[Panel, ...]:
        """Returns the coloured sentence, once per layer; padding is omitted."""
        found = []
        for row, strings in enumerate(self.tokens.strings):
            real = self.tokens.mask[row].nonzero()[:, 0].tolist()
            words = tuple(strings[place] for place in real)
            for layer, each in zip(self.layers, self.values[row].tolist(), strict=True):
                values = tuple(each[place] for place in real)
                title = f"{self.title}, layer {layer}"
                found.append(ColoredText(title, self.caption, words, values, self.unit))
        return tuple(found)
