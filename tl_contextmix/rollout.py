"""Multiplying a map through the layers: from one block's mixing to the whole model's."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch

from tl_contextmix.errors import bad
from tl_contextmix.results import ContextMap


def rollout(
    map: ContextMap, *, add_identity: bool | None = None, encoder: ContextMap | None = None
) -> ContextMap:
    r"""Returns how much each input token reaches each position after every layer.

    .. math:: R_0 = S_0, \qquad R_l = S_l R_{l-1}

    with :math:`S_l` the map of layer ``l``. Where the map holds the residual connection, it is
    taken as it is (GlobEnc, Modarressi et al. 2022). Where it does not (attention weights; norms
    at ``attn_out``), each row of :math:`S_l` is first averaged with its own token, at the row's
    sum: :math:`(S_l + \mathrm{diag}(S_l 1)) / 2`. For rows that sum to 1 that is
    :math:`0.5 S_l + 0.5 I` (Abnar & Zuidema 2020); a row of zeros becomes the token itself, at 1.

    A decoder block that attends to an encoder reads both: its map is :math:`[S_l | C_l]`, the
    decoder's tokens followed by the encoder's. What it reads of the encoder has been mixed there,
    so the encoder's own rollout :math:`E` comes behind it, as in ALTI+ (Ferrando et al. 2022,
    "Towards Opening the Black Box of Neural Machine Translation"):

    .. math:: [R_l | Q_l] = [S_l R_{l-1} \,|\, S_l Q_{l-1} + C_l E], \qquad R_{-1} = I,\ Q_{-1} = 0

    :math:`Q_l` says how much each *source* token reaches each target position.

    Rows are not scaled here: normalise first (`ContextMap.normalize`) for weights that sum to 1, as
    every published rollout does. `ContextMap.bias` is dropped; what enters through biases is
    followed by no rollout.

    Args:
        map: A map over one set of tokens, or of a decoder over its own and the encoder's; heads
            averaged or summed, all layers from the first.
        add_identity: Whether to add the residual connection; None: where the map lacks it.
        encoder: The encoder's map of the same input and kind, not rolled out, for a decoder that
            reads one.

    Returns:
        A `ContextMap` of the same shape; the last layer is the rollout over all of them.

    Raises:
        InvalidInput: If heads are still separate, layers are missing or out of order, source
            and target are different tokens, the encoder's map is missing or of other tokens, or a
            map is a rollout.

    Cost: ``2 n^3`` operations per layer and sentence, ``2 t (t + s)^2`` for ``t`` target and ``s``
    source tokens.
    """
    _require_rollable(map, encoder)
    memory = (
        None if encoder is None else rollout(encoder, add_identity=add_identity).scores[:, -1, 0]
    )
    add_identity = not map.includes_residual if add_identity is None else add_identity
    scores = map.scores[:, :, 0]
    own = scores.shape[-2]
    if add_identity:
        sums = scores.sum(-1)
        sizes = torch.where(sums == 0, torch.ones_like(sums), sums)
        diagonal = torch.diag_embed(sizes * map.target.mask.to(scores)[:, None])
        scores = torch.cat([scores[..., :own] + diagonal, scores[..., own:]], dim=-1)
        scores = scores * (sizes / (sums + sizes))[..., None]
    if memory is not None:
        scores = torch.cat([scores[..., :own], scores[..., own:] @ memory[:, None]], dim=-1)
    layers = [scores[:, 0]]
    for layer in range(1, scores.shape[1]):
        reached = scores[:, layer, :, :own] @ layers[-1]
        reached[..., own:] += scores[:, layer, :, own:]
        layers.append(reached)
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


def _require_rollable(map: ContextMap, encoder: ContextMap | None) -> None:
    if len(map.heads) != 1:
        _refuse(
            f"{len(map.heads)} heads", "one map per layer", "Take .mean('head') or sum the heads."
        )
    _require_tokens(map, encoder)
    if map.layers != tuple(range(len(map.layers))):
        _refuse(
            f"layers {list(map.layers)}",
            "all layers from 0 in order",
            "Compute the map for every layer (layer=None).",
        )
    if map.from_input:
        _refuse(map.unit, "maps of single layers", "Roll the map out once.")


def _require_tokens(map: ContextMap, encoder: ContextMap | None) -> None:
    """Checks that targets are the first sources, and the others those of the encoder's map."""
    rows = [*range(len(map.target.strings))]
    length = map.target.ids.shape[1]
    places = [*range(map.source.ids.shape[1])]
    first, others = (map.source.select(rows, part) for part in (places[:length], places[length:]))
    if not map.target.equals(first) or (encoder is None and places[length:]):
        _refuse(
            f"targets of {map.target.sides}, sources of {map.source.sides}",
            "the same tokens on both axes, or a decoder's tokens followed by its encoder's",
            "Use the encoder stack, pass the encoder's map as encoder=, "
            "select(source='decoder') to leave the encoder's tokens out, or take the same "
            "positions on both axes.",
        )
    if encoder is not None and not encoder.target.equals(others):
        _refuse(
            f"an encoder map of {encoder.target.sides}, sources of {map.source.sides}",
            "the encoder's map of the same input",
            "Pass the map of stack='encoder' for a decoder that reads an encoder, and none else.",
        )


def _refuse(seen: str, expected: str, remedy: str) -> NoReturn:
    raise bad("this map cannot be rolled out", seen, expected, remedy)
