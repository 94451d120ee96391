"""A third sublayer: an embedding of the token for each layer, gated by the stream (Gemma 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import FeedForward, Trace


@dataclass(frozen=True)
class PerLayerEmbedding(FeedForward):
    """A feed-forward sublayer whose neurons are multiplied with a vector of the token.

    ``(g(x W_in) * vector) W_out``. The vector depends on what enters the first block, and on the
    token, but on nothing that a block writes: it is held, as a router's weight is.

    Attributes:
        vector: Name of the vector, which no host shows; see `adapters.per_layer_embeddings`.
    """

    vector: str = ""

    @property
    def kind(self) -> str:
        """What it is among the components of the stream."""
        return "per_layer_embed"

    @property
    def held_names(self) -> tuple[str, ...]:
        """Names of the activations that `followed` reads."""
        return (self.vector,)

    def reread(self, x: Float[Tensor, "*some d_model"]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields the gate that is computed of its input, see `FeedForward.reread`."""
        (pre,) = self.pre_activations(x)
        yield "recomputed gate", self.pre, pre

    def followed(self, trace: Trace, where: Any = slice(None)) -> PerLayerEmbedding:
        """Returns the sublayer with the vectors of a pass held, at some places."""
        return replace(self, gain=trace[self.vector][where])
