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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from _block_reading import open_bridge, read_pass, settled
from jaxtyping import Float, Int
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.tools.analysis._model_state import require_int, to_token_ids
from transformer_lens.tools.analysis.logit_lens import _require_decoder_unembed

from tl_contextmix.adapters.reading import Handle, candidates, read_norm
from tl_contextmix.adapters.verification.probe import relative_error
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.residual_stream import (
    AttentionComponent,
    FeedForwardComponent,
    Neurons,
    Stream,
    decompose_stream,
)
from tl_contextmix.core.tiled_logits import NormRule, Vocabulary, read_vocabulary
from tl_contextmix.engine.log_prob_scores import best_neurons

Unit = Literal["layer", "head", "position", "neuron"]
_UNITS, _NORM_RULES = get_args(Unit), get_args(NormRule)


@dataclass(frozen=True)
class ModelView:
    """What the residual stream is read from.

    Attributes:
        name: Name of the model.
        stacks: Its blocks.
        device: Where the maths happens.
        tolerance: Largest relative error that counts as equal.
    """

    name: str
    stacks: Mapping[str, Sequence[Block]]
    device: torch.device
    tolerance: float


@dataclass(frozen=True)
class Split:
    """The neurons of a feed-forward sublayer.

    Attributes:
        step: Place of the sublayer in the stream.
        neurons: Its neurons.
    """

    step: int
    neurons: Neurons
    read = None

    @property
    def count(self) -> int:
        """How many they are."""
        return self.neurons.rows.shape[0]


@dataclass(frozen=True)
class LogProbContributionsResult:
    """Result of :func:`log_prob_contributions`.

    Attributes:
        scores: Increase of the target's log-probability in nats, ``[component, batch]``.
        labels: Name of each component: ``"embed"``, ``"3_attn_out"``, ``"3_mlp_out"`` by layer,
            ``"L3H1"``, ``"L3P4"`` (read from position 4) or ``"L3N70"`` else, and for the biases
            that none of these writes ``"3_attn_bias"`` and ``"3_mlp_bias"``.
        by: What the components are.
        norm: Rule for the final norm.
        target_ids: The token asked about, ``[batch]``.
        positions: The position that predicts it, ``[batch]``.
        log_probs: Its log-probability behind nothing, behind the embedding and behind each
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

    def top(self, k: int = 5, *, batch: int = 0) -> list[tuple[str, float]]:
        """Return the ``k`` components of an input that raise the target most.

        Args:
            k: How many.
            batch: Which input.
        """
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
            values per head and a dense elementwise feed-forward sublayer, if blocks, stream or
            logits are not reproduced, or if ``by="neuron"`` meets logits that are not linear in
            the stream (a soft cap, ``norm="recompute"``).
    """
    for name, value, known in (("by", by, _UNITS), ("norm", norm, _NORM_RULES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    top_k, max_bytes = require_int(top_k, "top_k"), require_int(max_bytes, "max_bytes")
    _require_decoder_unembed(model, operation="log_prob_contributions")
    handle, tolerance = open_bridge(model, "log_prob_contributions")
    readings = [
        list(candidates(handle, "decoder", "blocks", layer)) for layer in range(len(model.blocks))
    ]
    trace = read_pass(handle, readings, input, cache, attention_mask)
    found = [settled(options, trace, tolerance) for options in readings]
    view = ModelView(
        str(getattr(model.cfg, "model_name", type(model).__name__)),
        {"decoder": [block for block, _ in found]},
        handle.device,
        tolerance,
    )
    rows = _rows(pos, trace.batch.main.mask)
    stream = decompose_stream(view, trace, "decoder", rows)
    logits, error = _logits(model, handle, trace, stream, tolerance)
    ids = _target_ids(model, target, logits)
    readout = _readout(model, handle)
    vocabulary = read_vocabulary(readout, norm, stream.total, ids, max_bytes)
    if by == "neuron":
        scores, labels = _neuron_scores(vocabulary, stream, top_k)
    else:
        scores, labels = _scores(vocabulary, stream, by)
    return LogProbContributionsResult(
        scores=torch.cat(scores, dim=1).T,
        labels=labels,
        by=by,
        norm=norm,
        target_ids=ids,
        positions=rows,
        log_probs=vocabulary.target_log_probs(stream.states).T,
        identity_error=max(error, *(error for _, error in found)),
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


def _logits(
    model: Any, handle: Handle, trace: Trace, stream: Stream, tolerance: float
) -> tuple[torch.Tensor, float]:
    """The logits of the stream, and how far the model's own are from them."""
    found = _readout(model, handle)(stream.total)
    if trace.logits is None:
        return found, 0.0
    each = torch.arange(len(found), device=trace.logits.device)
    own = trace.logits[each, stream.rows.to(each.device)].to(found)
    error = relative_error(found, own)
    if not error <= tolerance:
        raise NotImplementedError(
            f"logits are not reproduced: they are off by {error:.3g} of the largest (tolerance "
            f"{tolerance:g}), so the model does more than a norm, W_U, b_U, a factor and a cap"
        )
    return own, error


def _target_ids(model: Any, target: Any, logits: torch.Tensor) -> torch.Tensor:
    if target is None:
        return logits.argmax(dim=-1)
    ids = to_token_ids(model, target)
    if len(ids) not in (1, len(logits)):
        raise ValueError(f"target needs one token, or one for each input, got {len(ids)}")
    return torch.tensor(ids, device=logits.device).expand(len(logits))


def _scores(
    vocabulary: Vocabulary, stream: Stream, by: Unit
) -> tuple[list[torch.Tensor], list[str]]:
    """Scores ``[batch, component]`` by layer, head or position, and the components' names."""
    scores: list[torch.Tensor] = []
    labels: list[str] = []
    for step, component in enumerate(stream.components):
        layer, state = component.layer, stream.states[:, step]
        if by == "layer":
            scores.append(vocabulary.gains(state, component.total[:, None]))
            labels.append("embed" if layer < 0 else f"{layer}_{component.kind}_out")
        elif isinstance(component, AttentionComponent):
            vectors = component.heads() if by == "head" else component.sources()
            letter = "H" if by == "head" else "P"
            scores.append(vocabulary.gains(state, vectors))
            labels += [f"L{layer}{letter}{number}" for number in range(vectors.shape[1])]
            scores.append(vocabulary.gains(state, component.bias[:, None]))
            labels.append(f"{layer}_attn_bias")
    return scores, labels


def _neuron_scores(
    vocabulary: Vocabulary, stream: Stream, k: int
) -> tuple[list[torch.Tensor], list[str]]:
    """Scores ``[batch, component]`` of the best neurons of each input, and their names."""
    if vocabulary.nonlinear:
        raise NotImplementedError(f"by='neuron' has no bound on scores: {vocabulary.nonlinear}")
    layers, splits = [], []
    for step, component in enumerate(stream.components):
        if isinstance(component, FeedForwardComponent):
            layers.append(component.layer)
            splits.append(Split(step, component.neurons()))
    if not splits:
        raise ValueError("by='neuron' needs feed-forward sublayers; this model has none")
    each = range(len(stream.rows))
    best = [best_neurons(vocabulary, stream.states[row], splits, k, row) for row in each]
    chosen = sorted({p for one in best for p in zip(one.split.tolist(), one.place.tolist())})
    scores = []
    for index, split in enumerate(splits):
        places = [place for which, place in chosen if which == index]
        numbers = split.neurons.coefficients[:, 0, places]
        vectors = numbers[..., None] * split.neurons.vectors(torch.tensor(places, dtype=torch.long))
        scores.append(vocabulary.gains(stream.states[:, split.step], vectors))
    return scores, [f"L{layers[index]}N{place}" for index, place in chosen]
