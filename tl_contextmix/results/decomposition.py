"""The decomposition: a block's activation as one vector per source token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import real_pairs, require_shape
from tl_contextmix.results.base import Result
from tl_contextmix.results.context_map import ContextMap
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False)
class Decomposition(Result):
    """A block's activation as a sum over source tokens plus a bias.

    ``parts.sum(source) + bias`` is the model's own activation at `point`, except at padding, where
    nothing is said of the parts.

    Attributes:
        parts: What each source token put there.
        bias: What belongs to no source token: output biases, norm biases and, through the
            feed-forward block, their image under the same slopes.
        layers: Number of each layer on the axis.
        point: Where in the block, for example ``"resid_post"``.
        stack: ``"decoder"``, ``"encoder"`` or ``"cross"``.
        target: Tokens of the rows.
        source: Tokens of the columns.
        provenance: Where the numbers come from.
    """

    parts: Float[torch.Tensor, "batch layer target source d_model"]
    bias: Float[torch.Tensor, "batch layer target d_model"]
    layers: tuple[int, ...]
    point: str
    stack: str
    target: Tokens
    source: Tokens
    provenance: Provenance

    def __post_init__(self) -> None:
        batch, target = self.target.ids.shape
        rows = (batch, len(self.layers), target)
        require_shape("Tokens of the source axis", self.source.ids[:, 0], (batch,))
        width = self.parts.shape[-1]
        shape = (*rows, self.source.ids.shape[1], width)
        require_shape("Decomposition.parts", self.parts, shape)
        require_shape("Decomposition.bias", self.bias, (*rows, width))

    def __repr__(self) -> str:
        batch, layer, target, source, width = self.parts.shape
        return (
            f"Decomposition at {self.point} ({self.stack}): batch {batch}, layer {layer}, "
            f"target {target}, source {source}, d_model {width}"
        )

    def total(self) -> Float[torch.Tensor, "batch layer target d_model"]:
        """Returns the sum of all parts and the bias: the model's activation at this point."""
        return self.parts.sum(dim=3) + self.bias

    def norms(self) -> ContextMap:
        """Returns the Euclidean norm of every part, as a map; 0 at padding."""
        target, source = self.target.mask, self.source.mask
        real = real_pairs(target, source)[:, None].to(self.parts.device)
        scores = self.parts.norm(dim=-1).masked_fill(~real, 0)
        bias = self.bias.norm(dim=-1).masked_fill(~target[:, None].to(self.bias.device), 0)
        return ContextMap(
            scores=scores[:, :, None],
            layers=self.layers,
            heads=("all",),
            point=self.point,
            stack=self.stack,
            target=self.target,
            source=self.source,
            unit="norm",
            includes_residual=self.point != "attn_out",
            provenance=self.provenance,
            bias=bias[:, :, None],
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns the norm of every part, one row each, with labels; no padding."""
        return self.norms().to_dataframe()

    def panels(self) -> tuple[Panel, ...]:
        """Returns the heatmaps of the norms."""
        return self.norms().panels()
