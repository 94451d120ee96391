"""How feed-forward sublayers get the top token of their sum: the figures of the 2021 paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.panels import Bars, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array
from tl_contextmix.results.base import Result
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labels import Provenance
from tl_contextmix.results.row_tables import as_text

if TYPE_CHECKING:
    import pandas

FIGURES: dict[str, tuple[str, str]] = {
    "active": ("Active memories", "Share of memories that are active."),
    "zero agreement": (
        "No memory agrees with its layer",
        "Share of positions where no active memory promotes the top token of the feed-forward "
        "output.",
    ),
    "residual = final": (
        "The stream has the final token",
        "Share of positions where the residual stream's top token is the model's final one.",
    ),
    "probability": (
        "Probability of the final token",
        "Probability of the model's final token, read from the residual stream.",
    ),
}
"""Title and meaning of each figure."""


def figure_rows(
    active: torch.Tensor,
    agreeing: torch.Tensor,
    residual_is_final: torch.Tensor,
    probability: torch.Tensor,
    case: torch.Tensor,
    cases: int,
) -> list[torch.Tensor]:
    """Returns each of `FIGURES` at every position (a yes is 1), then whether it is each case."""
    each = (case == index for index in range(cases))
    rows = (active, agreeing == 0, residual_is_final, probability, *each)
    return [row.to(active) for row in rows]


@storage.storable
@dataclass(frozen=True, eq=False)
class CompositionFigures(Result):
    """The figures of the 2021 paper, per layer, over the positions of a text or of a corpus.

    Attributes:
        sums: Sum over positions of each of `FIGURES` (a yes counts 1), then of each case.
        examples: How many positions.
        layers: Number of each layer.
        cases: Names of the cases.
        provenance: Where it comes from.
    """

    LABELS = {"layer": "layers", "quantity": "quantities"}

    sums: Float[torch.Tensor, "layer quantity"]
    examples: int
    layers: tuple[int, ...]
    cases: tuple[str, ...]
    provenance: Provenance

    def __repr__(self) -> str:
        return f"CompositionFigures over {self.examples} positions\n{as_text(self.to_dataframe())}"

    def __add__(self, other: CompositionFigures) -> CompositionFigures:
        """Returns the figures over the positions of both.

        Raises:
            InvalidInput: If the other ones are of another model, or were read in another way.
        """
        if not isinstance(other, CompositionFigures):
            return NotImplemented
        for mine, theirs in zip(self._told_apart_by(), other._told_apart_by(), strict=True):
            if mine != theirs:
                raise InvalidInput(
                    "figures cannot be added up",
                    f"{theirs} beside {mine}",
                    "figures of the same model and layers, read in the same way",
                    "Ask for both with the same options.",
                )
        examples = self.examples + other.examples
        return replace(self, sums=self.sums + other.sums, examples=examples)

    def _told_apart_by(self) -> tuple[object, ...]:
        where = self.provenance
        how = {name: where.options.get(name) for name in ("active", "projection")}
        return (where.model, where.fingerprint, self.layers, self.cases, how)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the figures: the paper's, then the share of each case."""
        return (*FIGURES, *self.cases)

    @property
    def values(self) -> Float[torch.Tensor, "layer quantity"]:
        """Means over positions; NaN where there are none."""
        return self.sums / self.examples if self.examples else self.sums * torch.nan

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per layer: every figure, the share of every case, how many positions."""
        import pandas

        frame = pandas.DataFrame(as_array(self.values), columns=[*self.quantities])
        frame.insert(0, "layer", list(self.layers))
        frame["examples"] = self.examples
        return frame

    def panels(self) -> tuple[Panel, ...]:
        """Returns the paper's bar charts."""
        labels = tuple(f"layer {layer}" for layer in self.layers)
        columns = as_array(self.values).T.tolist()
        note = f" Over {self.examples:,} positions."
        charts = [
            Bars(title, meaning + note, labels, ((title, tuple(each)),), "share", axis="layer")
            for (title, meaning), each in zip(FIGURES.values(), columns, strict=False)
        ]
        series = tuple(
            (in_plain_words(name), tuple(column))
            for name, column in zip(self.cases, columns[len(FIGURES) :], strict=True)
        )
        caption = (
            "Whose top token the layer's output has: the residual stream's, the feed-forward "
            "output's, both (agreement) or neither (composition); conflict: both have the same "
            "one, the sum another, which a norm with a bias makes possible."
        )
        title = "How outputs come about"
        return (*charts, Bars(title, caption + note, labels, series, "share", axis="layer"))
