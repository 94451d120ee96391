"""GlobEnc: norms of a whole encoder layer, the feed-forward output apart."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, run_asked
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import Block, Trace, sum_names
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import TokenSum
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, linear_points
from tl_contextmix.engine.registry import method
from tl_contextmix.results import ContextMap


@method(cites=("modarressi2022globenc",), compared=True)
def globenc(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap:
    r"""Returns GlobEnc's map of one layer; roll it out for the method itself.

    .. math:: C_{ij} = || L^{(2)}_i ( L^{(1)}_i ( T_{ij} + \delta_{ij} x_i ) ) ||_2

    (Modarressi et al. 2022, "GlobEnc", N-Enc), with :math:`T_{ij}` what attention carries from
    ``j`` and :math:`L^{(1)}, L^{(2)}` the linear parts of the norms that follow the two residual
    sums. Their scales are frozen at the model's own sums, the second one's with the feed-forward
    output in it; the output itself is skipped, which the paper justifies by the residual around
    it. The paper's attributions are ``globenc(model, text).normalize().rollout()``.

    The paper defines it for post-LN encoders (BERT). A pre-LN block has no norm after its sums,
    so that both :math:`L` are the identity and the map is that of
    ``attention_norms(at="resid_mid")``; norms of a sublayer's output (sandwich) are part of
    :math:`T_{ij}`. In a decoder with cross-attention :math:`T` is what both attentions bring. The
    output of a third sublayer (per-layer embeddings) is skipped like that of the feed-forward one.

    There is no published version to a prediction: ``decompx(of="logit")`` by the same authors and
    ``alti(of="logit")`` explain a logit.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder; both names of the
            decoder mean the same here, the source axis being its tokens, then the encoder's.
        max_bytes: Workspace.
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`; mask,
            padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer 1 target source] of norms, in units of the block's output. It
        has no bias: without the feed-forward output nothing adds up.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost per layer: ``2 n H^2 d + 2 n^2 H^2`` operations and ``n^2 H`` numbers; the
    [target, source, d_model] tensor is never built.
    """
    forward_pass = run_asked(
        as_view(model),
        input,
        inputs,
        layer=layer,
        stack=stack,
        also=partial(_needed, spare=inputs.get("cache") is None),
        needs={"mixing", "attn", "read", "mlp", "block"},
    )

    def norms(part: Pass, block: Block, whole: bool = True) -> Tensor:
        stream = linear_points(block, part.trace, part.stack)["residual"]
        return _without_output(block, stream, part.trace).norms(max_bytes, whole=whole)[:, None]

    axes, first = "batch head target source:block_out", partial(norms, whole=False)
    scores = forward_pass.by_block("globenc", axes, first, anew=norms)
    return forward_pass.map("globenc", scores, "block_out", "norm")


def _needed(block: Block, spare: bool) -> list[str]:
    """Returns the names of the sums that norms read; of a cache, or of a host without, neurons."""
    last = block.feed_forwards[-1:]
    if not last or last[0].norm_after is None:
        return []
    if spare and sum_names(last[0]):
        return [name for sublayer in block.sublayers for name in sum_names(sublayer)]
    return [ff.post for ff in block.feed_forwards]


def _without_output(block: Block, stream: TokenSum, trace: Trace) -> TokenSum:
    """Returns the stream past the block's last norm, whose scale alone knows the neurons."""
    norm = block.feed_forwards[-1].norm_after if block.feed_forwards else None
    if norm is None:
        return stream
    names = sum_names(block.feed_forwards[-1])
    if trace.values.keys() & names:  # its scale is needed alone: rounded, where the model rounds
        return stream.summing_to(trace[names[0]]).linear(norm)
    whole = stream.total
    for ff in block.feed_forwards:
        whole = whole + ff.output(trace)
    return stream.summing_to(whole).linear(norm)
