"""Multiplying a map through the layers: from one block's mixing to the whole model's."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.results import ContextMap


def rollout(map: ContextMap, *, add_identity: bool | None = None) -> ContextMap:
    r"""Returns how much each input token reaches each position after every layer.

    .. math:: R_0 = S_0, \qquad R_l = S_l R_{l-1}

    with :math:`S_l` the map of layer ``l``. Where the map holds the residual connection, it is
    taken as it is (GlobEnc, Modarressi et al. 2022). Where it does not (attention weights; norms
    at ``attn_out``), each row of :math:`S_l` is first averaged with its own token, at the row's
    sum: :math:`(S_l + \mathrm{diag}(S_l 1)) / 2`. For rows that sum to 1 that is
    :math:`0.5 S_l + 0.5 I` (Abnar & Zuidema 2020); a row of zeros becomes the token itself, at 1.

    Rows are not scaled here: normalise first (`ContextMap.normalize`) for weights that sum to 1, as
    every published rollout does. `ContextMap.bias` is dropped; what enters through biases is
    followed by no rollout.

    Args:
        map: A map over one set of tokens, heads averaged or summed, all layers from the first.
        add_identity: Whether to add the residual connection; None: where the map lacks it.

    Returns:
        A `ContextMap` of the same shape; the last layer is the rollout over all of them.

    Raises:
        InvalidInput: If heads are still separate, layers are missing or out of order, source
            and target are different tokens, or the map is a rollout.

    Cost: ``2 n^3`` operations per layer and sentence.
    """
    _require_rollable(map)
    add_identity = not map.includes_residual if add_identity is None else add_identity
    scores = map.scores[:, :, 0]
    if add_identity:
        sums = scores.sum(-1)
        sizes = torch.where(sums == 0, torch.ones_like(sums), sums)
        own = torch.diag_embed(sizes * map.target.mask.to(scores)[:, None])
        scores = (scores + own) * (sizes / (sums + sizes))[..., None]
    layers = [scores[:, 0]]
    for layer in range(1, scores.shape[1]):
        layers.append(scores[:, layer] @ layers[-1])
    options = {**map.provenance.options, "rollout": True, "add_identity": add_identity}
    return replace(
        map,
        scores=torch.stack(layers, dim=1)[:, :, None],
        bias=None,
        unit=f"rollout of {map.unit}",
        includes_residual=map.includes_residual or add_identity,
        from_input=True,
        provenance=replace(map.provenance, options=options),
    )


def _require_rollable(map: ContextMap) -> None:
    if len(map.heads) != 1:
        _refuse(
            f"{len(map.heads)} heads", "one map per layer", "Take .mean('head') or sum the heads."
        )
    if not map.target.equals(map.source):
        _refuse(
            f"targets of {map.target.sides}, sources of {map.source.sides}",
            "the same tokens on both axes",
            "Use the encoder stack, select(source='decoder') to leave the encoder's tokens out, "
            "or the same positions on both axes.",
        )
    if map.layers != tuple(range(len(map.layers))):
        _refuse(
            f"layers {list(map.layers)}",
            "all layers from 0 in order",
            "Compute the map for every layer (layer=None).",
        )
    if map.from_input:
        _refuse(map.unit, "maps of single layers", "Roll the map out once.")


def _refuse(seen: str, expected: str, remedy: str) -> NoReturn:
    raise InvalidInput(four_parts("this map cannot be rolled out", seen, expected, remedy))
