r"""Log-probability contributions.

How much did each component of the residual stream raise the log-probability of a token?
`Yu et al. 2023 <https://arxiv.org/abs/2312.12141>`_ and `Yu, Ananiadou 2024
<https://aclanthology.org/2024.emnlp-main.191>`_ score a vector :math:`v` by

.. math:: \mathrm{Imp}(v) = \log p(w \mid h + v) - \log p(w \mid h),

with :math:`h` the stream as the sublayer that wrote :math:`v` found it. Where direct logit
attribution compares logits, which a component can raise for every token alike, these scores
compare probabilities, and by layer they telescope: added up, they lead from the empty stream to
the model's own log-probability.

:func:`log_prob_contributions` needs one forward pass. A score is computed as the log of an
expectation of the small changes it is made of, never as a difference of two log-probabilities, and
the vocabulary is read in tiles that fit ``max_bytes``. Of neurons only those with the largest
scores are computed; a bound with one inner product per neuron tells which.

Example::

    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.log_prob_contributions import log_prob_contributions

    model = TransformerBridge.boot_transformers("gpt2", device="cpu")
    result = log_prob_contributions(model, "The capital of France is", target=" Paris", by="head")
    for label, score in result.top(5):
        print(f"{label:>12}: {score:+.3f} nats")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from _block_reading import open_bridge, read_pass, settled
from jaxtyping import Float, Int
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.tools.analysis._model_state import require_int, to_token_ids
from transformer_lens.tools.analysis.logit_lens import _require_direct_readout

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.norm_reading import read_norm
from tl_contextmix.adapters.reading import candidates
from tl_contextmix.adapters.verification.probe import relative_error
from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace, shift
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.tiled_logits import NormRule, Vocabulary, read_vocabulary

Unit = Literal["layer", "head", "position", "neuron"]
_UNITS, _NORM_RULES = get_args(Unit), get_args(NormRule)
# How many neurons of each input are scored first.
_BLOCK = 64


@dataclass(frozen=True)
class Write:
    """What a sublayer wrote to the stream of the predicting positions.

    Attributes:
        layer: Its layer.
        sublayer: Its weights, and the norm of its output where there is one.
        read: What the weights multiply: patterns times values ``[batch, head, source, d_head]``,
            or neurons ``[batch, neuron]``.
        total: All it wrote, biases included, ``[batch, d_model]``.
        bias: The part of it that no head and no neuron wrote, ``[batch, d_model]``.
        divisor: Scale of that norm as it really was, ``[batch, 1]``.
    """

    layer: int
    sublayer: AttentionSublayer | FeedForward
    read: torch.Tensor
    total: Float[torch.Tensor, "batch d_model"]
    bias: Float[torch.Tensor, "batch d_model"]
    divisor: Float[torch.Tensor, "batch 1"]

    @property
    def name(self) -> str:
        """Layer and kind."""
        return f"{self.layer}_{'mlp' if isinstance(self.sublayer, FeedForward) else 'attn'}"

    def arrive(self, vectors: Float[torch.Tensor, "batch part d_model"]) -> torch.Tensor:
        """What some of the sublayer's own output is in the stream."""
        norm = self.sublayer.norm_out
        return vectors if norm is None else norm.linear(vectors) / self.divisor[:, None]


@dataclass(frozen=True)
class LogProbContributionsResult:
    """Result of :func:`log_prob_contributions`.

    Attributes:
        scores: Increase of the target's log-probability in nats, ``[component, batch]``; with
            ``incorrect_tokens`` less that of the incorrect one's, as are ``log_probs``.
        labels: Name of each component: ``"embed"``, ``"3_attn_out"``, ``"3_mlp_out"`` by layer,
            ``"L3H1"``, ``"L3P4"`` (read from position 4) or ``"L3N70"`` else, and for the biases
            that none of these writes ``"3_attn_bias"`` and ``"3_mlp_bias"``.
        by: What the components are.
        norm: Rule for the final norm.
        target_ids: The token asked about, ``[batch]``.
        incorrect_ids: The token it is contrasted with, ``[batch]``, or None.
        positions: The position that predicts it, ``[batch]``.
        log_probs: Its log-probability after nothing, after the embedding and after each
            sublayer, ``[step, batch]``.
        identity_error: Largest relative error of the recomputed block outputs and logits.
    """

    scores: Float[torch.Tensor, "component batch"]
    labels: list[str]
    by: str
    norm: str
    target_ids: Int[torch.Tensor, " batch"]
    positions: Int[torch.Tensor, " batch"]
    log_probs: Float[torch.Tensor, "step batch"]
    identity_error: float
    incorrect_ids: Int[torch.Tensor, " batch"] | None = None

    def top(self, k: int = 5, *, batch: int = 0) -> list[tuple[str, float]]:
        """Return the ``k`` components that raise the target most in the input ``batch``."""
        k = require_int(k, "k")
        values, places = self.scores[:, batch].topk(min(k, len(self.labels)))
        return [(self.labels[i], v) for i, v in zip(places.tolist(), values.tolist(), strict=True)]

    def to_dataframe(self) -> Any:
        """One row per (component, input) as a pandas DataFrame."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.labels, range(self.scores.shape[1])], names=["component", "batch"]
        )
        values = self.scores.flatten().detach().cpu().numpy()
        return pd.DataFrame({"score": values}, index=index).reset_index()


@torch.no_grad()
def log_prob_contributions(
    model: Any,
    input: str | list[str] | torch.Tensor | None = None,
    *,
    target: str | int | Sequence[str | int] | torch.Tensor | None = None,
    incorrect_tokens: str | int | Sequence[str | int] | torch.Tensor | None = None,
    by: Unit = "layer",
    pos: int = -1,
    norm: NormRule = "frozen+beta",
    top_k: int = 10,
    cache: ActivationCache | None = None,
    attention_mask: torch.Tensor | None = None,
    max_bytes: int = 2**30,
) -> LogProbContributionsResult:
    """How much each component of the residual stream raised a token's log-probability.

    The model is run once with caching unless a ``cache`` is passed. Before anything is returned,
    each block is recomputed from its input, attention patterns, values and weights, the stream is
    compared with the sum of what was written to it, and logits are recomputed from it; a model
    that differs is refused by name. Of a cache, which holds no logits, the first two are checked.

    Heads, positions and neurons are scored alone against the stream their sublayer found, so that
    their scores do not add up to their layer's. Their vectors do, with those of the biases.

    Args:
        model: A decoder-only ``TransformerBridge`` in eval mode with attention patterns (eager
            attention).
        input: A prompt, prompts of the same number of tokens, or token ids ``[batch, pos]``.
            Optional when ``cache`` is given.
        target: The token asked about, as a single-token string or an id, one for all inputs or one
            for each; ``None`` for the model's best.
        incorrect_tokens: A token, or one for each input, that the target is contrasted with, as in
            ``direct_logit_attribution``. Scores are then increases of ``log p(target) -
            log p(incorrect)``; with the norm frozen and no soft cap they add up.
        by: Into what the stream is split: ``"layer"`` (the embedding and every sublayer),
            ``"head"``, ``"position"`` (what all heads of a layer read from one source; zero where
            nothing is read) or ``"neuron"`` (of feed-forward sublayers, an activation times a row
            of W_out).
        pos: Position that predicts; negative ones count from the last real token of each input.
        norm: Rule for the final norm: ``"frozen"`` (scale of the whole stream, no norm bias, no
            b_U), ``"frozen+beta"`` (with both, so that the whole stream has the model's own
            log-probability) or ``"recompute"`` (the norm of every state, as in the logit lens).
        top_k: By neuron: how many of each input are found, exactly those with the largest scores.
            All that are found are scored in every input.
        cache: A cache of a pass, instead of a run.
        attention_mask: 1 at real tokens and 0 at padding, ``[batch, pos]``.
        max_bytes: Bound on the workspace beside the pass, W_U and the result.

    Returns:
        A :class:`LogProbContributionsResult` with ``scores`` ``[component, batch]``.

    Raises:
        ValueError: If an argument is invalid, neither or an incomplete ``input`` or ``cache`` is
            given, the model is in training mode, or it does not unembed its last block's output.
        NotImplementedError: If the model has two stacks or blocks that are not attention with
            values per head and a dense elementwise feed-forward sublayer, norms on the stream
            itself (post-LN), or if blocks, stream or logits are not reproduced.
    """
    for name, value, known in (("by", by, _UNITS), ("norm", norm, _NORM_RULES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    top_k, max_bytes = require_int(top_k, "top_k"), require_int(max_bytes, "max_bytes")
    modules = getattr(model, "_modules", {})
    if not {"blocks", "unembed"} <= set(modules) or "encoder_blocks" in modules:
        raise NotImplementedError(
            "log_prob_contributions needs a decoder-only TransformerBridge with an unembedding, "
            f"got {type(model).__name__} with {sorted(modules)}"
        )
    _require_direct_readout(model, operation="log_prob_contributions")
    handle, tolerance = open_bridge(model, "log_prob_contributions")
    readings = [
        list(candidates(handle, "decoder", "blocks", layer)) for layer in range(len(model.blocks))
    ]
    trace = read_pass(handle, readings, input, cache, attention_mask)
    found = [settled(options, trace, tolerance) for options in readings]
    rows = _rows(pos, trace.batch.main.mask)
    blocks = [block for block, _ in found]
    each = torch.arange(len(rows), device=rows.device)
    start = trace.resid_in(blocks[0])[each, rows]
    writes = list(_writes(blocks, trace, rows))
    states = [torch.zeros_like(start), start]
    for write in writes:
        states.append(states[-1] + write.total)
    readout = _readout(model, handle)
    errors = [error for _, error in found]
    behind = trace[blocks[-1].resid_out][each, rows]
    errors.append(_error("streams after the last block", states[-1], behind, tolerance))
    logits = readout(states[-1])
    if trace.logits is not None:
        own = trace.logits[each, rows].to(logits)
        errors.append(_error("logits", logits, own, tolerance))
        logits = own
    ids = logits.argmax(dim=-1) if target is None else _target_ids(model, target, logits)
    foil = None
    if incorrect_tokens is not None:
        if target is None:
            raise ValueError("incorrect_tokens need a target that they are contrasted with")
        foil = _target_ids(model, incorrect_tokens, logits)
    asked = Contrast(tuple(ids[:, None]), None if foil is None else tuple(foil[:, None]))
    vocabulary = read_vocabulary(readout, norm, states[-1], asked, max_bytes)
    if by == "layer":
        vectors = [start, *(write.total for write in writes)]
        pairs = zip(states, vectors, strict=False)
        scores = [vocabulary.gains(state, vector[:, None]) for state, vector in pairs]
        labels = ["embed", *(f"{write.name}_out" for write in writes)]
    elif by == "neuron":
        scores, labels = _neuron_scores(vocabulary, states[1:], writes, top_k)
    else:
        scores, labels = _attention_scores(vocabulary, states[1:], writes, by)
    return LogProbContributionsResult(
        scores=torch.cat(scores, dim=1).T,
        labels=labels,
        by=by,
        norm=norm,
        target_ids=ids,
        positions=rows,
        log_probs=vocabulary.target_log_probs(torch.stack(states, dim=1)).T,
        identity_error=max(errors),
        incorrect_ids=foil,
    )


def _rows(pos: int, mask: torch.Tensor) -> torch.Tensor:
    """The position in each input, of a number that counts from its last real token if negative."""
    length = mask.shape[1]
    if isinstance(pos, bool) or not isinstance(pos, int) or not -length <= pos < length:
        raise ValueError(f"pos must be an integer from {-length} to {length - 1}, got {pos!r}")
    last = length - 1 - mask.int().flip(dims=[1]).argmax(dim=1)
    rows = last + 1 + pos if pos < 0 else torch.full_like(last, pos)
    if not bool(((rows >= 0) & mask.gather(1, rows.clamp(min=0)[:, None])[:, 0]).all()):
        raise ValueError(f"pos={pos} is padding in one of the inputs")
    return rows


def _readout(model: Any, handle: Handle) -> Readout:
    """From the last residual stream to logits, as far as linear maps, a norm and a cap say it."""
    norm, cap = model._modules.get("ln_final"), getattr(model.cfg, "output_logits_soft_cap", None)
    # A cap leaves what is near zero as it is, so that this is the factor on logits (Cohere).
    small = torch.full((1, 1, 1), 1e-6, dtype=torch.float64)
    scale = float(model.adapter.apply_output_logits_transform(small)) / 1e-6
    return Readout(
        norm=None if norm is None else read_norm(norm, handle),
        head=None,
        weights=lambda name: handle.ready(getattr(model, name)),
        scale=scale,
        soft_cap=cap if cap is not None and cap > 0 else None,
    )


def _error(name: str, value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    error = relative_error(value, expected)
    if not error <= tolerance:
        raise NotImplementedError(
            f"the {name}, recomputed, are not the model's: off by {error:.3g} of the largest entry "
            f"(tolerance {tolerance:g}); take off hooks of your own"
        )
    return error


def _target_ids(model: Any, tokens: Any, logits: torch.Tensor) -> torch.Tensor:
    ids = to_token_ids(model, tokens)
    if len(ids) not in (1, len(logits)):
        raise ValueError(f"one token is needed, or one for each input, got {len(ids)}")
    return torch.tensor(ids, device=logits.device).expand(len(logits))


def _writes(blocks: Sequence[Block], trace: Trace, rows: torch.Tensor) -> Iterator[Write]:
    """What each sublayer wrote at one position of each input, in the order of the sublayers."""
    each = torch.arange(len(rows), device=rows.device)
    for block in blocks:
        for attention in block.attentions:
            pattern = trace.pattern(attention)[each, :, rows]
            read = pattern[..., None] * trace.value(attention).transpose(1, 2)
            raw = torch.einsum("bhsd,hdm->bm", read, attention.W_O)
            constant = shift(torch.zeros_like(raw), attention.b_O)
            yield _write(block.layer, attention, read, raw, constant)
        ff = block.feed_forward
        if ff is not None:
            post, b_post = trace[ff.post][each, rows], ff.weights("b_post")
            post = post if b_post is None else post - b_post
            raw = post @ ff.W_out
            yield _write(block.layer, ff, post, raw, ff.constant().expand_as(raw))


def _write(
    layer: int,
    sublayer: AttentionSublayer | FeedForward,
    read: torch.Tensor,
    raw: torch.Tensor,
    constant: torch.Tensor,
) -> Write:
    """A sublayer's write, from what it computed with and without biases before its output norm."""
    if sublayer.norm_after is not None:
        raise NotImplementedError(f"layer {layer} norms the residual stream itself (post-LN)")
    norm = sublayer.norm_out
    if norm is None:
        return Write(layer, sublayer, read, raw + constant, constant, torch.ones_like(raw[:, :1]))
    scale = norm.scale(raw + constant)
    bias = shift(norm.linear(constant) / scale, norm.bias)
    return Write(layer, sublayer, read, norm.linear(raw) / scale + bias, bias, scale)


def _attention_scores(
    vocabulary: Vocabulary, states: Sequence[torch.Tensor], writes: Sequence[Write], by: Unit
) -> tuple[list[torch.Tensor], list[str]]:
    """Scores ``[batch, component]`` of heads or positions, and the components' names."""
    scores: list[torch.Tensor] = []
    labels: list[str] = []
    form, letter = ("bhsd,hdm->bhm", "H") if by == "head" else ("bhsd,hdm->bsm", "P")
    for state, write in zip(states, writes, strict=False):
        if isinstance(write.sublayer, AttentionSublayer):
            vectors = write.arrive(torch.einsum(form, write.read, write.sublayer.W_O))
            scores += [vocabulary.gains(state, v) for v in (vectors, write.bias[:, None])]
            labels += [f"L{write.layer}{letter}{number}" for number in range(vectors.shape[1])]
            labels.append(f"{write.name}_bias")
    return scores, labels


def _neuron_scores(
    vocabulary: Vocabulary, states: Sequence[torch.Tensor], writes: Sequence[Write], k: int
) -> tuple[list[torch.Tensor], list[str]]:
    """Scores ``[batch, component]`` of the best neurons of each input, and their names.

    Neurons are scored in the order of the bound ``vector @ slope`` until none that is left reaches
    an input's k-th score. Where logits are not linear in the stream there is no bound.
    """
    bounds: list[torch.Tensor] = []
    labels: list[str] = []
    pairs = zip(states, writes, strict=False)
    layers = [(s, w, w.sublayer) for s, w in pairs if isinstance(w.sublayer, FeedForward)]
    if not layers:
        raise ValueError("by='neuron' needs feed-forward sublayers; this model has none")
    for state, write, ff in layers:
        bound = torch.full_like(write.read, torch.inf)
        for row in range(0 if vocabulary.nonlinear else len(bound)):
            before = vocabulary.log_probs(state[row : row + 1], row)
            norm, slope = ff.norm_out, vocabulary.slopes(before, row)[0, 0]
            along = (ff.W_out if norm is None else norm.linear(ff.W_out)) @ slope
            bound[row] = write.read[row] * along / write.divisor[row]
        bounds.append(bound)
        labels += [f"L{write.layer}N{neuron}" for neuron in range(bound.shape[1])]
    bound = torch.cat(bounds, dim=1)
    scores = torch.full_like(bound, -torch.inf)
    k, size = min(k, len(labels)), _BLOCK
    # A score that lies within a few roundings of a bound is not decided by it.
    slack = 64 * torch.finfo(bound.dtype).eps * (1 + bound.abs().amax(dim=1))
    while bool((bound.amax(dim=1) + slack > scores.topk(k).values[:, -1]).any()):
        chosen = bound.topk(min(size, len(labels))).indices.unique()
        start = 0
        for state, write, ff in layers:
            end = start + write.read.shape[1]
            here = chosen[(chosen >= start) & (chosen < end)]
            vectors = write.read[:, here - start, None] * ff.W_out[here - start]
            scores[:, here] = vocabulary.gains(state, write.arrive(vectors))
            start = end
        bound[:, chosen] = -torch.inf
        # The next vectors are at most so many times this tensor.
        fits = vocabulary.max_bytes // (8 * len(bound) * states[0].numel())
        size = max(_BLOCK, min(2 * size, fits))
    best = scores.topk(k).indices.unique()
    return [scores[:, best]], [labels[place] for place in best.tolist()]
