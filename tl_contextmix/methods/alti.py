"""ALTI: how much closer each token's part moves a position to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, run_asked
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.core.residual_stream import AttentionComponent, decompose_stream, needed
from tl_contextmix.core.rollout import roll_back, roll_out
from tl_contextmix.core.token_sums import blocks
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.logit_maps import LogitReader, logit_map
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, identities, linear_points
from tl_contextmix.engine.registry import method
from tl_contextmix.results import ContextMap


def _papers(options: Mapping[str, Any]) -> tuple[str, ...]:
    to_logit = ("ferrando2023explaining",) if options.get("of", "logit") == "logit" else ()
    return ("ferrando2022measuring", *to_logit)


# Elementwise work on all parts: larger tiles leave the cache between two steps.
_TILE_BYTES = 2**24


@method(cites=_papers, compared=True)
def alti(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    of: Literal["distance", "logit"] = "distance",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap:
    r"""Returns ALTI's contributions of one layer; roll them out for the method itself.

    .. math:: C_{ij} = \max(0, ||y_i||_1 - ||y_i - F_{ij}||_1), \qquad
              y_i = \sum_j F_{ij} + b_i

    (Ferrando et al. 2022, "Measuring the mixing of contextual information in the transformer").
    :math:`y_i` is the residual stream after attention: past its norm in post-LN models, the bare
    sum in pre-LN models; biases are in :math:`y_i` and in no part. A part that points away from
    :math:`y_i` scores 0, as in the paper. Scores are raw distances: the paper's token-to-token
    contributions are ``.normalize()``, its attributions ``.normalize().rollout()``.

    To a prediction (``of="logit"``; ALTI-Logit, Ferrando et al. 2023, "Explaining how transformers
    use context to build predictions"), what attention reads from each position of a layer is
    carried on to the logit, and each position back to the input by the rollout of the layers below:

    .. math:: C_k = \sum_l \sum_j \Delta^l_j\, M^{l-1}_{jk}, \qquad
              l_w - l_f = \sum_k C_k + b

    with :math:`\Delta^l_j` what all heads of layer :math:`l` read from position :math:`j`, past
    the final norm with its scale frozen, times the target's column of :math:`W_U` less the foil's,
    and :math:`M^l` the ``.normalize().rollout()`` after layer :math:`l`, :math:`M^0 = I`. A score
    has a sign. In :math:`b` is what attention does not read: what entered the first block at the
    predicting position, the feed-forward sublayers, and biases (those of values travel with their
    token). The paper has pre-LN models; in post-LN ones parts pass the norms that follow, frozen.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers; None for all (of logits: added up). Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder. In its decoder
            the parts are those after both attentions, of the decoder's tokens followed by the
            encoder's, whichever of its names is given (this is not ALTI+, which treats the two
            attentions as two layers).
        of: ``"distance"`` of the parts or the ``"logit"`` of a prediction.
        max_bytes: Workspace of a block of targets and sources.
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`, and of
            logits ``foil``; mask, padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer 1 target source], in units of the residual stream's L1 norm. Of
        logits: one signed map, a row for each prediction; with ``layer=`` one for what attention
        adds in each of these layers, without a bias.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong; for logits also those
            that cap them or have a masked-LM head, which is not linear.

    Cost per layer: ``2 n^2 H d`` operations within ``max_bytes``; L1 needs every part. Of logits
    also ``2 n^3``, and ``2 n H d`` for each prediction.
    """
    view, needs = as_view(model), identities(("resid_mid",))
    if of == "logit":
        return _to_prediction(view, input, inputs, layer, stack, max_bytes)
    forward_pass = run_asked(view, input, inputs, layer=layer, stack=stack, needs=needs)

    def closer(part: Pass, block: Block) -> Tensor:
        return _closer(block, part.trace, max_bytes)[:, None]

    scores = forward_pass.by_block("alti", "batch head target source:block_out", closer)
    after_norm = forward_pass.blocks[0].attentions[-1].norm_after is not None
    point = "mlp_in" if after_norm else "resid_mid"
    options = {"of": "distance"}
    return forward_pass.map(
        "alti", scores, "block_out", "L1 distance", options=options, point=point
    )


def _to_prediction(
    view: ModelView,
    input: Input,
    inputs: AnswerInputs,
    layer: Layers | None,
    stack: StackName | None,
    max_bytes: int,
) -> ContextMap:
    """Returns what each input token brings to the logits asked about, through attention."""
    encoder = view.stacks.get("encoder", ()) if view.base_stack(None) == "decoder" else ()

    def also(block: Block) -> list[str]:
        names = [name for one in encoder for name in one.points()] if block.layer == 0 else []
        return [*needed(block), *names]

    def updates(part: Pass, read: Sequence[LogitReader]) -> Tensor:
        memory, below = None, part.blocks[:-1]
        if encoder:
            memory = _rolled(encoder, part.trace, None, max_bytes)[:, -1]
        reached = _rolled(below, part.trace, memory, max_bytes) if below else None
        brought = torch.stack([_brought(part, one) for one in read], dim=1)
        return roll_back(brought, reached, memory)

    return logit_map(
        "alti",
        view,
        input,
        inputs,
        updates,
        max_bytes=max_bytes,
        options={},
        layer=layer,
        stack=stack,
        also=also,
        needs=identities(("resid_mid",)) | {"block"},
    )


def _rolled(
    blocks: Sequence[Block], trace: Trace, memory: Tensor | None, max_bytes: int
) -> Float[Tensor, "batch layer target source"]:
    """Returns the paper's attributions after each of some layers."""
    maps = [_closer(block, trace, max_bytes) for block in blocks]
    scores = torch.stack(maps, dim=1)
    sums = scores.sum(dim=-1, keepdim=True)
    shares = scores / torch.where(sums == 0, torch.ones_like(sums), sums)
    return roll_out(shares, trace.batch.side(blocks[0].attentions[0].stack).mask, False, memory)


def _brought(part: Pass, read: LogitReader) -> Float[Tensor, "batch layer source"]:
    """Returns what attention reads from each position of each layer, as logits."""
    view, stack = part.view, part.view.base_stack(None)
    stream = decompose_stream(view, part.trace, stack, read.rows)
    own, sources = part.target.shape[1], part.source("block_out").shape[1]
    result = read.total.new_zeros(len(read.rows), len(part.blocks), sources)
    for component in stream.components:
        if isinstance(component, AttentionComponent):
            logits = read.vocabulary.target_logits(component.sources())
            columns = slice(own) if component.kind == "attn" else slice(own, None)
            result[:, component.layer, columns] = logits
    return result


def _closer(block: Block, trace: Trace, max_bytes: int) -> Tensor:
    """Returns the scores of a block [batch target source], some targets and sources at a time."""
    stream = linear_points(block, trace, "decoder")["stream"]
    batch, target, width = stream.total.shape
    heads = sum(read.pattern.shape[1] for read in stream.terms)
    pair, room = width * stream.total.element_size(), min(max_bytes, _TILE_BYTES)
    # Per source its vectors through each head, per pair the part and three of its kind.
    columns = max(1, min(stream.sources, room // (4 * heads * pair)))
    rows = max(1, min(target, room // (5 * pair * columns)))
    texts = max(1, room // (pair * columns * (4 * heads + 5 * rows)))
    out = stream.total.new_zeros(batch, target, stream.sources)
    for some in blocks(batch, texts):
        one = stream.row(some)
        for sources in blocks(stream.sources, columns):
            ready = one.ready(sources)
            for targets in blocks(target, rows):
                y = one.total[:, None, targets]
                parts = ready.dense(targets, sources)
                # Term by term: what contributes nothing scores exactly 0, in any order of the sum.
                gain = (y.abs() - (y - parts).abs()).sum(dim=-1).clamp(min=0)
                out[some, targets, sources] = gain.transpose(1, 2)
    return out
