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
    sink: Float[Tensor, "batch layer target"] | None = None,
) -> Float[Tensor, "batch layer target reached"]:
    """Returns the product of the maps up to each layer; see `ContextMap.rollout`.

    Args:
        scores: A map per layer; sources beyond the targets are an encoder's.
        mask: True at real targets.
        add_identity: Whether each row is first averaged with its own token, at the row's sum.
        memory: The encoder's own product, for maps that read one.
        sink: What each row gives to a source that reads nothing; the last column of the product is
            then what has ended there.
    """
    own = scores.shape[-2]
    if add_identity:
        sums = scores.sum(-1) if sink is None else scores.sum(-1) + sink
        sizes = torch.where(sums == 0, torch.ones_like(sums), sums)
        diagonal = torch.diag_embed(sizes * mask.to(scores)[:, None])
        scores = torch.cat([scores[..., :own] + diagonal, scores[..., own:]], dim=-1)
        share = sizes / (sums + sizes)
        scores, sink = scores * share[..., None], None if sink is None else sink * share
    if memory is not None:
        scores = torch.cat([scores[..., :own], scores[..., own:] @ memory[:, None]], dim=-1)
    scores = scores if sink is None else torch.cat([scores, sink[..., None]], dim=-1)
    layers: list[Tensor] = []
    for one in scores.unbind(dim=1):
        layers.append(_onto(one, layers[-1]) if layers else one)
    return torch.stack(layers, dim=1)


def roll_back(
    updates: Float[Tensor, "batch row layer source"],
    reached: Float[Tensor, "batch before target source"] | None,
    memory: Float[Tensor, "batch encoder_source encoder_input"] | None = None,
) -> Float[Tensor, "batch row layer source"]:
    """Returns what each layer's own sources bring as what the input's tokens bring.

    Args:
        updates: Of each layer, what its sources bring; sources beyond the targets are an encoder's.
        reached: The product of the maps up to each layer but the last, see `roll_out`; None where
            there is one layer.
        memory: The encoder's own product, where one is read.
    """
    if memory is not None:
        own = updates.shape[-1] - memory.shape[-2]
        updates = torch.cat([updates[..., :own], updates[..., own:] @ memory[:, None]], dim=-1)
    first, *later = updates.unbind(dim=2)
    below = () if reached is None else reached.unbind(dim=1)
    found = [_onto(one, maps) for one, maps in zip(later, below, strict=True)]
    return torch.stack([first, *found], dim=2)


def _onto(
    rows: Float[Tensor, "batch row source"], reached: Float[Tensor, "batch target source"]
) -> Float[Tensor, "batch row source"]:
    """Returns rows over a layer's sources as rows over the input's, which have reached them."""
    own = reached.shape[1]
    result = rows[..., :own] @ reached
    result[..., own:] += rows[..., own:]
    return result
