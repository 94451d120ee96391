"""Which components activate the neurons that write an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import largest
from tl_contextmix.results.component_sets import SHOWN, ComponentSet, component_table
from tl_contextmix.results.components import Components
from tl_contextmix.results.labels import Provenance, Tokens


@storage.storable
@dataclass(frozen=True, eq=False)
class QueryContributions(ComponentSet):
    """How much each component of the residual stream activated some neurons.

    Attributes:
        scores: Each component's share of the neurons' own scores, added up over the neurons. What
            is missing to the sum of those is the share of the neurons' constants. NaN in empty
            places: sentences may have different components.
        components: What they belong to.
        by: Into what the streams were cut.
        share: ``"exact"`` or ``"ratio"``.
        inner: Inner products with the keys of each neuron (gated: of the gate branch). NaN where
            the component writes to a stream the neuron does not read.
        linear: The same of the linear branch of gated neurons; NaN for others.
        shares: Part of each neuron's activation.
        neurons: The neurons that were asked about.
        weights: Their own scores.
        pre: Their pre-activations (gated: of the gate); exactly the sum of `inner`, over a cut by
            layers, and `constant`.
        activation: Their activations; the sum of `shares` and of the constants' share.
        constant: The part of `pre` that the neuron's own bias and its norm's bias bring.
        tokens: The tokens of the stack that writes the answer.
        encoder: The tokens of the encoder, or None.
        provenance: Where the numbers come from.
        sentence: Row of the input that each row is about.
    """

    LABELS = {"component": "components", "neuron": "neurons"}
    COLUMNS = {"score": "scores"}

    scores: Float[torch.Tensor, "batch component"]
    components: Components
    by: str
    share: str
    inner: Float[torch.Tensor, "batch neuron component"]
    linear: Float[torch.Tensor, "batch neuron component"]
    shares: Float[torch.Tensor, "batch neuron component"]
    neurons: Components
    weights: Float[torch.Tensor, "batch neuron"]
    pre: Float[torch.Tensor, "batch neuron"]
    activation: Float[torch.Tensor, "batch neuron"]
    constant: Float[torch.Tensor, "batch neuron"]
    tokens: Tokens
    encoder: Tokens | None
    provenance: Provenance
    sentence: Int[torch.Tensor, " batch"] = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        batch, neurons, count = self.inner.shape
        lines = [
            f"QueryContributions by {self.by}, {self.share}: batch {batch}, neuron {neurons}, "
            f"component {count}"
        ]
        for row in range(min(batch, 3)):
            best = []
            for place in largest(self.scores[row], 5).tolist():
                at, score = int(self.components.pos[row, place]), float(self.scores[row, place])
                best.append(f"{self.components.label(row, place)} at {at} {score:+.3f}")
            lines.append("  " + ", ".join(best))
        return "\n".join(lines)

    def panels(self) -> tuple[Panel, ...]:
        """Returns, for each sentence: a map where there is one, and the largest scores."""
        found: list[Panel] = []
        for row in range(self.scores.shape[0]):
            places = (~self.neurons.is_empty()[row]).nonzero()[:, 0].tolist()
            names = [self.neurons.label(row, place) for place in places]
            asked = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            found += self._grids(
                row,
                self.by,
                f"What activates {asked}",
                "Blue activates the neurons, red works against them.",
                "share of the neurons' scores",
            )
            found.append(self._table(row, asked))
        return tuple(found)

    def _table(self, row: int, asked: str) -> Table:
        lines = []
        for place in largest(self.scores[row], SHOWN).tolist():
            one = self.components.at(row, place)
            own = self.encoder if one["kind"].startswith("encoder") else None
            at = "" if one["pos"] is None else (own or self.tokens).strings[row][one["pos"]]
            score = float(self.scores[row, place])
            lines.append((self.components.label(row, place), at, self._word(one, row), score))
        return component_table(
            title=f"What activates {asked}",
            caption=f"Shares of the neurons' own scores ({self.share}), added up over them.",
            columns=("component", "at", "source", "score"),
            rows=lines,
            signed=("score",),
        )
