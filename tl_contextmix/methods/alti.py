"""ALTI: how much closer each token's part moves a position to its output."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input, Pass
from tl_contextmix.adapters.questions import AnswerInputs, run_asked
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import TokenSum, blocks
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, identities, linear_points
from tl_contextmix.engine.registry import method
from tl_contextmix.results import ContextMap


@method(cites=("ferrando2022measuring",), compared=True)
def alti(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
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

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder. In its decoder
            the parts are those after both attentions, of the decoder's tokens followed by the
            encoder's, whichever of its names is given (this is not ALTI+, which treats the two
            attentions as two layers).
        max_bytes: Workspace of a block of targets and sources.
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`; mask,
            padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer 1 target source], in units of the residual stream's L1 norm.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost per layer: ``2 n^2 H d`` operations within ``max_bytes``; L1 needs every part.
    """
    needs = identities(("resid_mid",))
    done = run_asked(as_view(model), input, inputs, layer=layer, stack=stack, needs=needs)

    def closer(part: Pass, block: Block) -> Tensor:
        stream = linear_points(block, part.trace, part.stack)["stream"]
        return _closer(stream, max_bytes)[:, None]

    scores = done.by_block("alti", "batch head target source:block_out", closer)
    after_norm = done.blocks[0].attentions[-1].norm_after is not None
    point = "mlp_in" if after_norm else "resid_mid"
    return done.map("alti", scores, "block_out", "L1 distance", point=point)


def _closer(stream: TokenSum, max_bytes: int) -> Tensor:
    """Returns the scores [batch target source], some targets and sources at a time."""
    batch, target, width = stream.total.shape
    heads = sum(read.pattern.shape[1] for read in stream.terms)
    pair = width * stream.total.element_size()
    # Per source its vectors through each head, per pair the part and three of its kind.
    columns = max(1, max_bytes // (4 * heads * pair))
    rows = max(1, max_bytes // (5 * pair * min(columns, stream.sources)))
    out = stream.total.new_zeros(batch, target, stream.sources)
    for row in range(batch):
        one = stream.row(slice(row, row + 1))
        for sources in blocks(stream.sources, columns):
            for targets in blocks(target, rows):
                y = one.total[:, None, targets]
                parts = one.dense(targets, sources)
                # Term by term: what contributes nothing scores exactly 0, in any order of the sum.
                gain = (y.abs() - (y - parts).abs()).sum(dim=-1).clamp(min=0)
                out[row, targets, sources] = gain[0].T
    return out
