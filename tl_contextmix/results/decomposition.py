"""The decomposition: a block's activation as one vector per source token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from tl_contextmix.plotting.panels import Panel
from tl_contextmix.results import storage
from tl_contextmix.results.axes import positions
from tl_contextmix.results.context_map import ContextMap
from tl_contextmix.results.labelled_arrays import LabelledArray
from tl_contextmix.results.labels import Provenance, Tokens

if TYPE_CHECKING:
    import pandas


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(LabelledArray):
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

    LABELS = {"layer": "layers", "target": "target", "source": "source"}
    ARRAY = "parts"
    SUBTRACTED = ("parts", "bias")

    parts: Float[torch.Tensor, "batch layer target source d_model"]
    bias: Float[torch.Tensor, "batch layer target d_model"]
    layers: tuple[int, ...]
    point: str
    stack: str
    target: Tokens
    source: Tokens
    provenance: Provenance

    def _heading(self) -> str:
        return f" at {self.point} ({self.stack})"

    def total(self) -> Float[torch.Tensor, "batch layer target d_model"]:
        """Returns the sum of all parts and the bias: the model's activation at this point."""
        summed = [self.axes.index(axis) for axis in ("head", "source") if axis in self.axes]
        return self.parts.sum(dim=summed) + self.bias

    def norms(self, *, without: int | Sequence[int] = ()) -> ContextMap:
        """Returns the Euclidean norm of every part, as a map; 0 at padding.

        Args:
            without: Dimension or dimensions of the residual stream that do not count, such as
                outliers that a norm's gain makes large (Kobayashi et al. 2024).

        Raises:
            InvalidInput: If there is no such dimension.
        """
        listed = [without] if isinstance(without, int) else [*without]
        dims = positions("d_model", listed, range(self.bias.shape[-1])) if listed else []
        kept = torch.ones_like(self.bias[0, 0, 0]).index_fill(
            0, torch.tensor(dims, device=self.bias.device).long(), 0
        )
        real = self.target.real_pairs(self.source)[:, None, None].to(self.parts.device)
        scores = (self.parts * kept if dims else self.parts).norm(dim=-1)
        by_head = "head" in self.axes
        scores = scores if by_head else scores[:, :, None]
        bias = (
            (self.bias * kept)
            .norm(dim=-1)
            .masked_fill(~self.target.mask[:, None].to(self.bias.device), 0)
        )
        return ContextMap(
            scores=scores.masked_fill(~real, 0),
            layers=self.layers,
            heads=self._labels("head") if by_head else ("all",),
            point=self.point,
            stack=self.stack,
            target=self.target,
            source=self.source,
            unit="norm of a difference" if self.is_difference else "norm",
            includes_residual=self.point != "attn_out",
            provenance=self.provenance,
            bias=None if by_head else bias[:, :, None],
        )

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """Returns the parts of the ``k`` largest norms, see `ContextMap.top`."""
        return self.norms().top(k)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns the norm of every part, one row each, with labels; no padding."""
        return self.norms().to_dataframe()

    def panels(self) -> tuple[Panel, ...]:
        """Returns the heatmaps of the norms."""
        return self.norms().panels()


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class HeadDecomposition(Decomposition):
    """A block's activation as a sum over heads and source tokens plus a bias.

    ``parts.sum((head, source)) + bias`` is the model's own activation. Norms per head have no bias:
    it belongs to no head.

    Attributes:
        parts: What came from each source token through each head, and through none.
        heads: Label of each head; ``"residual"`` is the token's own residual stream.
    """

    LABELS = {**Decomposition.LABELS, "head": "heads"}

    parts: Float[torch.Tensor, "batch layer head target source d_model"]
    heads: tuple[str, ...]
