"""Maps multiplied through the layers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def roll_out(
    scores: Float[Tensor, "batch layer target source"],
    mask: Bool[Tensor, "batch target"],
    add_identity: bool,
    memory: Float[Tensor, "batch encoder_source encoder_input"] | None = None,
) -> Float[Tensor, "batch layer target source"]:
    """Returns the product of the maps up to each layer; see `ContextMap.rollout`.

    Args:
        scores: A map per layer; sources beyond the targets are an encoder's.
        mask: True at real targets.
        add_identity: Whether each row is first averaged with its own token, at the row's sum.
        memory: The encoder's own product, for maps that read one.
    """
    own = scores.shape[-2]
    if add_identity:
        sums = scores.sum(-1)
        sizes = torch.where(sums == 0, torch.ones_like(sums), sums)
        diagonal = torch.diag_embed(sizes * mask.to(scores)[:, None])
        scores = torch.cat([scores[..., :own] + diagonal, scores[..., own:]], dim=-1)
        scores = scores * (sizes / (sums + sizes))[..., None]
    if memory is not None:
        scores = torch.cat([scores[..., :own], scores[..., own:] @ memory[:, None]], dim=-1)
    layers = [scores[:, 0]]
    for layer in range(1, scores.shape[1]):
        reached = scores[:, layer, :, :own] @ layers[-1]
        reached[..., own:] += scores[:, layer, :, own:]
        layers.append(reached)
    return torch.stack(layers, dim=1)
