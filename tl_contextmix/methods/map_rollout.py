"""Multiplying a map through the layers: from one block's mixing to the whole model's."""

from __future__ import annotations

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
    return map.rollout(add_identity=add_identity, encoder=encoder)
