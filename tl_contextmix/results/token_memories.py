"""Which source token feeds which memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, require_shape
from tl_contextmix.results.base import Result
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False)
class TokenMemory(Result):
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

    shares: Float[torch.Tensor, "batch layer target source neuron"]
    bias: Float[torch.Tensor, "batch layer target neuron"]
    neurons: tuple[int, ...]
    layers: tuple[int, ...]
    stack: str
    target: Tokens
    source: Tokens
    provenance: Provenance

    def __post_init__(self) -> None:
        batch, target = self.target.ids.shape
        shape = (batch, len(self.layers), target)
        count = len(self.neurons)
        sources = self.source.ids.shape[1]
        require_shape("TokenMemory.shares", self.shares, (*shape, sources, count))
        require_shape("TokenMemory.bias", self.bias, (*shape, count))

    def __repr__(self) -> str:
        sizes = zip(
            ("batch", "layer", "target", "source", "neuron"), self.shares.shape, strict=True
        )
        return "TokenMemory: " + ", ".join(f"{name} {size}" for name, size in sizes)

    @property
    def coefficients(self) -> Float[torch.Tensor, "batch layer target neuron"]:
        """Coefficients: the shares of all tokens and of none, added up."""
        return self.shares.sum(3) + self.bias

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per share; rows of padding and columns of padding are left out."""
        import numpy as np
        import pandas

        real = self.target.mask[:, :, None] & self.source.mask[:, None, :]
        shape = self.shares.shape
        real = real[:, None, :, :, None].expand(shape).cpu().numpy()
        batch, layer, target, source, neuron = np.nonzero(real)
        return pandas.DataFrame(
            {
                "batch": batch,
                "layer": np.array(self.layers, dtype=np.int64)[layer],
                "neuron": np.array(self.neurons, dtype=np.int64)[neuron],
                "target": target,
                "source": source,
                "target_token": np.array(self.target.strings, dtype=object)[batch, target],
                "source_token": np.array(self.source.strings, dtype=object)[batch, source],
                "score": as_array(self.shares)[real],
            }
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns a table per layer: the largest memories of the last target, source by source."""
        last = int(self.target.mask[0].nonzero()[-1])
        columns = [*self.source.strings[0], "no token", "coefficient"]
        # Two sources may be the same word, and columns are told apart by their names.
        heads = [f"{word or '∅'} ({place})" for place, word in enumerate(columns[:-2])] + columns[
            -2:
        ]
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
                    "shares of a row, that of no token included, add up to the coefficient.",
                    columns=("memory", *heads),
                    rows=tuple(rows),
                    signed=tuple(heads),
                )
            )
        return tuple(found)
