"""Which source token feeds which memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens
from tl_contextmix.results.row_tables import token_at


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class TokenMemory(LabelledArray):
    """Which source token feeds which memory: shares that add up to the coefficient.

    Attributes:
        shares: Share of each source token in each coefficient; 0 at padding.
        bias: The share of no token; 0 at padding.
        neurons: The memories.
        layers: Number of each layer.
        stack: The stack.
        target: Positions whose memories they are.
        source: Positions they are fed from.
        provenance: Where it comes from.
    """

    LABELS = {"layer": "layers", "target": "target", "source": "source", "neuron": "neurons"}
    COLUMNS = {"score": "shares"}
    SUBTRACTED = ("shares", "bias")
    BY_SIZE = True

    shares: Float[torch.Tensor, "batch layer target source neuron"]
    bias: Float[torch.Tensor, "batch layer target neuron"]
    neurons: tuple[int, ...]
    layers: tuple[int, ...]
    stack: str
    target: Tokens
    source: Tokens
    provenance: Provenance

    @property
    def coefficients(self) -> Float[torch.Tensor, "batch layer target neuron"]:
        """Coefficients: the shares of all tokens and of none, added up."""
        return self.shares.sum(3) + self.bias

    def panels(self) -> tuple[Panel, ...]:
        """Returns a table per layer: the largest memories of the last target, source by source."""
        last = int(self.target.mask[0].nonzero()[-1])
        # Two sources may be the same word, and columns need different names.
        tokens = zip(self.source.strings[0], self.source.labels(), strict=True)
        heads = [token_at(word, place) for word, place in tokens]
        heads += ["no token", "coefficient"]
        found = []
        for index, layer in enumerate(self.layers):
            total = self.coefficients[0, index, last]
            rows = []
            for place in total.abs().topk(min(10, len(total))).indices.tolist():
                shares = self.shares[0, index, last, :, place].tolist()
                rest = float(self.bias[0, index, last, place])
                name = f"L{layer}.{self.neurons[place]}"
                rows.append((name, *shares, rest, float(total[place])))
            found.append(
                Table(
                    title=f"What feeds the memories of layer {layer} at "
                    f"{self.target.strings[0][last]!r}",
                    caption="Share of every source token in the coefficient of a memory; the "
                    "shares of a row, that of no token included, add up to the coefficient."
                    + " Differences of two results."
                    * self.is_difference,
                    columns=("memory", *heads),
                    rows=tuple(rows),
                    signed=tuple(heads),
                )
            )
        return tuple(found)
