"""Attention norms: attention maps that include values, residual, norms and the feed-forward block.

Kobayashi et al. 2020 ("Attention is not only a weight"), 2021 (residual connection and LayerNorm)
and 2024 ("Analyzing feed-forward blocks in transformers through the lens of attention maps").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs
from tl_contextmix.adapters.passes import Pass, run_asked, run_pass
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.feed_forward_parts import FeedForwardParts, Precision
from tl_contextmix.core.folded_weights import Folds
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import AttentionTerm, TokenSum
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.citations import norm_papers
from tl_contextmix.engine.parts import (
    DEFAULT_MAX_BYTES,
    POINTS,
    Bias,
    Heads,
    Point,
    group_labels,
    head_groups,
    identities,
    linear_points,
    norms_at,
    parts_at,
    parts_at_all,
)
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, warn
from tl_contextmix.results import ContextMap, TokenFigures
from tl_contextmix.results.headings import in_plain_words

# From so many operations on, about a second of one core, it pays to choose another precision.
_MANY = 10**11


@overload
def attention_norms(
    model: object,
    input: Input,
    *,
    at: Point = ...,
    heads: Heads = ...,
    layer: Layers | None = ...,
    stack: StackName | None = ...,
    bias: Bias = ...,
    precision: Precision = ...,
    max_bytes: Positive = ...,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap: ...


@overload
def attention_norms(
    model: object,
    input: Input,
    *,
    at: Sequence[Point],
    heads: Heads = ...,
    layer: Layers | None = ...,
    stack: StackName | None = ...,
    bias: Bias = ...,
    precision: Precision = ...,
    max_bytes: Positive = ...,
    **inputs: Unpack[AnswerInputs],
) -> dict[Point, ContextMap]: ...


@method(cites=norm_papers, compared={f"attention_norms {at}": {"at": at} for at in POINTS})
def attention_norms(
    model: object,
    input: Input,
    *,
    at: Point | Sequence[Point] = "block_out",
    heads: Heads = False,
    layer: Layers | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    precision: Precision = "full",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap | dict[Point, ContextMap]:
    r"""Returns the norm of what each source token contributes to each target token.

    .. math:: C_{ij} = || F_{ij} ||_2

    with :math:`F_{ij}` the part of source ``j`` in the activation of target ``i``
    (`tl_contextmix.engine.parts`). By point, with the papers' names:

    ============== ============================ ==================================
    ``at``         post-LN (BERT)               pre-LN (GPT-2)
    ============== ============================ ==================================
    ``attn_out``   Attn-N (2020)                Attn-N (2020)
    ``resid_mid``  AttnRes-N (2021)             AttnRes-N; ATB (2024)
    ``mlp_in``     AttnResLn-N; ATB (2024)      ATB + LN
    ``mlp_out``    ATB + FF                     ATB + LN + FF
    ``resid_post`` ATB + FF + RES               ATB + LN + FF + RES
    ``block_out``  ATB + FF + RES + LN          as ``resid_post``
    ============== ============================ ==================================

    ``mlp_in`` is what the feed-forward block reads, the norm's gain and bias included, unlike
    TransformerLens' ``hook_normalized``, which is in front of them.

    Norms are of the sum over heads unless ``heads`` is asked for. Nothing is normalised: use
    `ContextMap.normalize`. Biases (value biases apart, which travel with their token) belong to no
    source; their norm is in `ContextMap.bias`.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        at: Point or points; several share one forward pass.
        heads: True: one map per head (2020, eq. 4) instead of the norm of their sum. A number or a
            list of numbers: the norm of the sum of these. A list of lists: one map per group. All
            but False at ``attn_out`` only.
        layer: Layer or layers; None for all.
        stack: See `decompose`.
        bias: See `decompose`; it changes the points after the feed-forward block.
        precision: ``"bfloat16"`` takes the products with W_out in bfloat16, nearly all operations
            of the points after the feed-forward block. Its error is in the documentation (numerical
            accuracy). A bfloat16 model gets a warning where it would save much.
        max_bytes: Workspace, see `decompose`.
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`; mask,
            padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer head target source], or one per point where several are asked.
        A score is a norm, in units of the residual stream at that point.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost per layer: up to ``mlp_in`` ``2 n H^2 d + 2 n^2 H^2`` operations and ``n^2 H`` numbers;
    after the feed-forward block ``2 n^2 d_mlp (d + H)`` operations (half if causal) within
    ``max_bytes``, once for all of its points. The [target, source, d_model] tensor is never built.
    Of ReLU neurons only active ones count where they are few. A target of many sources has its
    slopes folded into the weights where that is cheaper (from about 1,000 of them in GPT-2 small):
    ``2 d^2 (d_mlp + n)`` for each. W_O folded into W_in, ``2 d^2 d_mlp``, is kept as by
    `value_zeroing`.
    """
    points: list[Point] = [at] if isinstance(at, str) else [*at]
    _require_heads(heads, points)
    needs = identities(points)
    forward_pass = run_asked(as_view(model), input, inputs, layer=layer, stack=stack, needs=needs)
    if precision != "full":
        _require_products(forward_pass, points)
    found = _maps(forward_pass, list(dict.fromkeys(points)), heads, bias, precision, max_bytes)
    return found[points[0]] if isinstance(at, str) else found


def _require_heads(heads: Heads, points: list[Point]) -> None:
    if not points or (heads is not False and points != ["attn_out"]):
        raise InvalidInput(
            "these maps cannot be computed",
            f"heads={heads} at {points}",
            "at least one point; heads at 'attn_out' only",
            "Past the residual sum a head has no part of its own.",
        )


def _require_products(forward_pass: Pass, points: list[Point]) -> None:
    """Raises InvalidInput unless value vectors are multiplied, and with more than a few pairs."""
    seen = f"precision='bfloat16' at {points}"
    if any(
        block.feed_forward is not None and block.feed_forward.routes
        for block in forward_pass.blocks
    ):
        seen += ", a model of experts"
    elif set(points) & set(POINTS[3:]):
        return
    raise InvalidInput(
        "nothing here is computed in bfloat16",
        seen,
        f"a point after a feed-forward block without experts: {list(POINTS[3:])}",
        "Leave precision out.",
    )


def _maps(
    forward_pass: Pass,
    points: list[Point],
    heads: Heads,
    bias: Bias,
    precision: Precision,
    max_bytes: int,
) -> dict[Point, ContextMap]:
    groups, folds = head_groups(forward_pass, heads), Folds(forward_pass.blocks)
    products: list[tuple[Tensor, int, int]] = []

    def norms_of(part: Pass) -> dict[str, tuple[str, Tensor]]:
        scores: dict[str, list[Tensor]] = {point: [] for point in points}
        biases: dict[str, list[Tensor]] = {point: [] for point in points}
        if set(points) & {*POINTS[3:]}:
            part.trace.look_up(part.blocks)
        for block in part.progress("attention_norms"):
            linear = linear_points(block, part.trace, part.stack, points)
            held = block.held(part.trace)
            parts = parts_at_all(held, linear, points, bias, max_bytes, folds)
            norms = norms_at(parts, max_bytes, precision) if groups is None else {}
            if part.trace.values[block.resid_in].dtype == torch.bfloat16:
                products.extend(_products(parts))
            for point, terms in parts.items():
                biases[point].append(terms.bias.norm(dim=-1)[:, None])
                if groups is None:
                    scores[point].append(norms[point][:, None])
                else:
                    assert isinstance(terms, TokenSum)
                    scores[point].append(_grouped(terms.terms[0], groups, max_bytes))
        result = {}
        for point in points:
            axes = f"batch layer head target source:{point}"
            result[point] = axes, torch.stack(scores[point], dim=1)
            result[f"{point} bias"] = "batch layer head target", torch.stack(biases[point], dim=1)
        return result

    with torch.no_grad():
        numbers = forward_pass.together(norms_of)
    if precision == "full":
        _offer_bfloat16(products)
    result = {}
    lower = {} if precision == "full" else {"precision": precision}
    for point in points:
        result[point] = forward_pass.map(
            "attention_norms",
            numbers[point],
            point,
            "norm",
            heads=group_labels(groups),
            options={"at": point, "heads": heads, "bias": bias} | lower,
            includes_residual=point != "attn_out",
            # The output bias belongs to no head.
            bias=numbers[f"{point} bias"] if groups is None else None,
        )
    return result


def _products(
    parts: Mapping[Point, TokenSum | FeedForwardParts],
) -> Iterator[tuple[Tensor, int, int]]:
    """Yields how many pairs go through neurons, and the operations of each: all, and with W_out."""
    found = [one for one in parts.values() if isinstance(one, FeedForwardParts)]
    if not found or found[-1].sublayer.routes:
        return
    neurons, width = found[-1].W_out.shape
    for read in found[-1].read.terms:
        mixed = len(found[-1].slopes) * read.pattern.shape[1]
        pairs = (read.pattern != 0).any(dim=1).sum()
        yield pairs, 2 * neurons * (width + mixed), 2 * neurons * width


def _offer_bfloat16(products: list[tuple[Tensor, int, int]]) -> None:
    """Warns of products in float32 that a bfloat16 model could take in bfloat16, if many."""
    if not products:
        return
    pairs = torch.stack([count.cpu() for count, _, _ in products]).double()
    whole, low = (
        float(pairs @ torch.tensor([one[place] for one in products], dtype=torch.float64))
        for place in (1, 2)
    )
    if whole >= _MANY:
        warn(
            f"these norms took {whole / 1e12:.2g} TFLOP in float32 though the model is in "
            f"bfloat16: precision='bfloat16' takes {low / whole:.0%} of them in bfloat16, which "
            "takes less time where the machine has such products"
        )


def _grouped(read: AttentionTerm, groups: list[list[int]], max_bytes: int) -> Tensor:
    """Returns the norms of the parts that groups of heads read [batch group target source]."""
    if all(len(group) == 1 for group in groups):
        return read.head_norms()[:, [head for (head,) in groups]]
    return torch.stack([read.through(group).norms(max_bytes) for group in groups], dim=1)


@method(cites=("kobayashi2021incorporating", "kobayashi2024analyzing"))
def mixing_ratio(
    model: object,
    input: Input,
    *,
    at: Point = "mlp_in",
    layer: Layers | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[Inputs],
) -> TokenFigures:
    r"""Returns how much of each token comes from other tokens.

    .. math:: r_i = \frac{||\sum_{j \ne i} F_{ij}||}{||\sum_{j \ne i} F_{ij}|| + ||F_{ii}||}

    (Kobayashi et al. 2021, section 3.3: mixing against preserving). 0: the token kept itself; 1:
    all from others.

    Args:
        model: Any TransformerLens model.
        input: A text, several, or token ids [batch, pos].
        at: The point; the paper's Attn-N, AttnRes-N and AttnResLn-N are ``attn_out``,
            ``resid_mid`` and, in post-LN models, ``mlp_in``.
        layer: Layer or layers; None for all.
        stack: See `decompose`. Encoder tokens that a decoder reads count as others.
        bias: See `decompose`.
        max_bytes: Workspace.
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        `TokenFigures` [batch layer pos] between 0 and 1; 0 at padding.

    Raises:
        InvalidInput: If an argument does not fit the model, or the point has no diagonal
            (cross-attention alone).
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: ``O(n d_model H)`` up to ``mlp_in``, from the diagonal and the total alone; after the
    feed-forward block also one row of neurons per token, never all pairs.
    """
    needs = identities((at,))
    forward_pass = run_pass(
        as_view(model), Given(input, **inputs), layer=layer, stack=stack, needs=needs
    )
    if at == "attn_out" and forward_pass.stack == "cross":
        raise InvalidInput(
            "there is no mixing ratio of cross-attention alone",
            "at='attn_out', stack='cross'",
            "a point at which a token can come from itself",
            "Ask for 'resid_mid' or later.",
        )

    def ratios(part: Pass, block: Block) -> Tensor:
        linear = linear_points(block, part.trace, part.stack, (at,))
        parts = parts_at(block.held(part.trace), linear, at, bias, max_bytes)
        own = parts.diagonal()
        others = parts.total - parts.bias - own
        mixing, preserving = others.norm(dim=-1), own.norm(dim=-1)
        both = mixing + preserving
        return torch.where(both > 0, mixing / both, torch.zeros_like(both))

    values = forward_pass.by_block("mixing_ratio", "batch target", ratios)
    return TokenFigures(
        values=values * forward_pass.target.mask.to(values.device)[:, None],
        layers=forward_pass.layers,
        tokens=forward_pass.target,
        title=f"Mixing ratio, {in_plain_words(at)}",
        caption="Share of each token that comes from other tokens: 0 all its own, 1 all others'.",
        unit="ratio",
        provenance=forward_pass.provenance("mixing_ratio", {"at": at, "bias": bias}),
    )
