"""What an attention sublayer with an output gate reads, as a term of token sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.token_sums import AttentionTerm, Keep, blocks


@dataclass(frozen=True)
class GatedTerm(AttentionTerm):
    """A term whose heads are multiplied with a gate of the target, dimension by dimension.

    ``sum_h (pattern[h,i,j] value[j,h] * gate[i,h]) weight[h] / scale[i]``. No vector is the same at
    all targets, so each pair is multiplied with the weights: ``d_head`` times the operations.

    Attributes:
        gate: The gate.
    """

    gate: Float[Tensor, "batch target head d_head"] = field(kw_only=True)

    @property
    def per_pair(self) -> int:
        """How many numbers it takes for a pair of target and source, besides the result."""
        return 2 * self.weight.shape[0] * self.weight.shape[1]

    def vectors(self, sources: slice | None = None) -> Tensor:
        """There are none: what a source gives depends on the target."""
        raise NotImplementedError

    def dense(self, rows: slice, sources: slice) -> Float[Tensor, "batch source target d_out"]:
        """Returns the sum over heads for a block of rows and sources."""
        pattern = self.pattern[:, :, rows, sources] / self.scale[:, None, rows]
        read = (
            pattern.permute(3, 0, 2, 1)[..., None]
            * self.value[:, sources].transpose(0, 1)[:, :, None]
        )
        mixed = (read * self.gate[:, rows]).flatten(3)
        return (mixed @ self.weight.flatten(0, 1)).transpose(0, 1)

    def before_weights(
        self, batch: int, target: int, sources: slice
    ) -> Float[Tensor, "source read"]:
        """Returns what a target reads of each source before the heads' weights, one after another.

        ``dense`` is its product with ``weight.flatten(0, 1)``.
        """
        return super().before_weights(batch, target, sources) * self.gate[batch, target].flatten()

    def together(self, rows: slice, sources: slice) -> Float[Tensor, "batch target d_out"]:
        """Returns the sum over heads and sources."""
        pattern, value = self.pattern[:, :, rows, sources], self.value[:, sources]
        mixed = torch.einsum("bhts,bshd->bthd", pattern, value) * self.gate[:, rows]
        return mixed.flatten(2) @ self.weight.flatten(0, 1) / self.scale[:, rows]

    def diagonal(self) -> Float[Tensor, "batch target d_out"]:
        """Returns what each target reads from itself."""
        seen = self.pattern.diagonal(dim1=2, dim2=3).transpose(1, 2)
        mixed = self.value * seen[..., None] * self.gate
        return mixed.flatten(2) @ self.weight.flatten(0, 1) / self.scale

    def map(self, matrix: Float[Tensor, "d_out d_new"], keep: Keep | None = None) -> GatedTerm:
        """Returns the read after a matrix, folded into every head's weight."""
        weight = self.weight @ matrix if keep is None else keep(self.weight, matrix)
        return replace(self, weight=weight)

    def row(self, batch: slice, **_: Any) -> GatedTerm:
        """Returns the read of some rows of the batch."""
        return super().row(batch, gate=self.gate[batch])

    def ready(self, sources: slice | None = None) -> GatedTerm:
        """Returns the read itself: there is nothing to keep."""
        return self

    def through(self, heads: slice | Sequence[int], **_: Any) -> GatedTerm:
        """Returns the read through some of its heads."""
        heads = heads if isinstance(heads, slice) else list(heads)
        return super().through(heads, gate=self.gate[:, :, heads])

    def head_norms(self) -> Float[Tensor, "batch head target source"]:
        """Returns the norm each head reads from each source."""
        heads = range(self.pattern.shape[1])
        return torch.stack([self.through([head]).norms(0) for head in heads], dim=1)

    def norms(self, max_bytes: int, *, whole: bool = True) -> Float[Tensor, "batch target source"]:
        """Returns the norm of the sum over heads, some sources at a time; always whole."""
        batch, _, target, source = self.pattern.shape
        size = batch * target * self.pattern.element_size()
        out = self.pattern.new_empty(batch, target, source)
        for sources in blocks(source, max_bytes // (size * (self.per_pair + self.weight.shape[2]))):
            out[:, :, sources] = self.dense(slice(None), sources).norm(dim=-1).transpose(1, 2)
        return out
