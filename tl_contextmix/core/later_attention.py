"""Cross-attention after an attention sublayer that changes: it sees the change by its queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Sublayer, Trace, require_weight, shift
from tl_contextmix.core.token_sums import beside
from tl_contextmix.errors import UnsupportedModel


@dataclass(frozen=True)
class LaterAttention:
    """The sublayer, and what of it does not change.

    Attributes:
        attention: The sublayer.
        seen: Which sources each target reads at all.
        key: Its keys.
        value: Its values.
        factor: What hooks scaled its heads with, or None.
        added: What hooks added to the residual sum after it, or None.
    """

    attention: AttentionSublayer
    seen: Bool[Tensor, "batch target head source"]
    key: Float[Tensor, "batch source head d_head"]
    value: Float[Tensor, "batch source head d_head"]
    factor: Float[Tensor, "batch target head"] | None = None
    added: Float[Tensor, "batch target d_model"] | None = None

    @classmethod
    def of(
        cls, attention: AttentionSublayer, trace: Trace, rows: slice | list[int]
    ) -> LaterAttention:
        """Returns the sublayer at some targets of a pass."""
        # Padding stays masked. Not told by the pattern: a softmax in float32 underflows to zeros
        # that other queries can read (4e-2 of a score on the embedded encoder-decoder).
        shape = trace.pattern(attention)[:, :, rows].permute(0, 2, 1, 3).shape
        real = beside(trace.values[attention.pattern], trace.batch.main.mask)
        factor = trace.factor(attention)
        return cls(
            attention,
            real[:, None, None, :].expand(shape),
            trace.key(attention),
            trace.value(attention),
            None if factor is None else factor[:, rows],
            added_after(attention, trace, rows),
        )

    def add(
        self, stream: Float[Tensor, "batch source target d_model"], rows: slice
    ) -> Float[Tensor, "batch source target d_model"]:
        """Returns changed residual streams after the sublayer."""
        key, seen = self.key[:, None], self.seen[:, None, rows]
        pattern = cross_pattern(self.attention, stream, key, seen)
        mixed = torch.einsum("bsthk,bkhd->bsthd", pattern, self.value)
        if self.factor is not None:
            mixed = mixed * self.factor[:, None, rows, :, None]
        out = torch.einsum("bsthd,hdm->bstm", mixed, self.attention.W_O)
        added = None if self.added is None else self.added[:, None, rows]
        return self.attention.join(shift(stream, added), shift(out, self.attention.b_O))


def added_after(sublayer: Sublayer, trace: Trace, rows: slice | list[int]) -> Tensor | None:
    """Returns what hooks added to the residual sum after a sublayer, at some targets."""
    found = trace.edit(sublayer.edits.stream)
    return None if found is None else found[:, rows]


def cross_pattern(
    attention: AttentionSublayer,
    stream: Float[Tensor, "*batch target d_model"],
    key: Tensor,
    seen: Tensor,
) -> Float[Tensor, "*batch target head source"]:
    """Returns the pattern of a cross-attention sublayer for a residual stream.

    Args:
        attention: The sublayer.
        stream: The residual stream it reads, before its norm.
        key: Keys [batch source head d_head], with a 1 for every further axis of ``stream``.
        seen: Which sources are not masked, to fit the result.

    Raises:
        UnsupportedModel: If the factor of its scores is not known.
    """
    weight = require_weight(attention.weights, "W_Q")
    if attention.scale is None:
        raise UnsupportedModel(
            "what a changed query attends to cannot be computed",
            f"{attention.pattern}, whose scores are not q k times 1 or 1/sqrt(d_head)",
            "plain cross-attention",
            "Ask for stack='encoder' or stack='cross'.",
        )
    x = stream if attention.norm_in is None else attention.norm_in(stream)
    query = torch.einsum("...tm,hmd->...thd", x, weight)
    query = shift(query, attention.weights("b_Q"))
    scores = torch.einsum("...thd,...khd->...thk", query, key) * attention.scale
    if attention.soft_cap is not None:
        scores = attention.soft_cap * torch.tanh(scores / attention.soft_cap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
