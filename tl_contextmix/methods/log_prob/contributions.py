"""Log-probability increase of components of the residual stream (Yu et al. 2023, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import AnswerInputs, Direction, split_answer
from tl_contextmix.core.tiled_logits import NormRule, Vocabulary
from tl_contextmix.core.token_sums import beside
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.log_prob_scores import (
    By,
    Increases,
    Prediction,
    Split,
    best_components,
    log_prob_increases,
    progress,
    run_question,
    split_stream,
)
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import LogProbContributions
from tl_contextmix.results.component_sets import join_rows
from tl_contextmix.results.components import Components, join, padding

Score = Literal[
    "log_prob_increase",
    "log_prob",
    "prob_increase",
    "norm",
    "coefficient",
    "rank",
    "coefficient_norm",
    "coefficient_rank",
]
_NEURONS = ("ff_neuron", "attn_neuron")


@method(cites=("yu2023exploring", "yu2024neuron"))
def log_prob_contributions(
    model: object,
    input: Input,
    *,
    by: By = "layer",
    norm: NormRule = "frozen+beta",
    score: Score = "log_prob_increase",
    dictionary: Dictionaries = None,
    k: Positive | None = None,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> LogProbContributions:
    r"""Returns how much each component of the residual stream raised a token's log-probability.

    .. math:: \mathrm{Imp}(v) = \log p(w \mid h + v) - \log p(w \mid h)

    (2024, section 3.3), with :math:`h` the stream as the component's sublayer found it: before the
    attention sublayer for what attention writes, after it for the feed-forward sublayer.

    The stream at the predicting position is a sum of everything written to it, which is added up
    in the order of the sublayers, starting from nothing: what enters the first block (``embed``),
    then attention, cross-attention and feed-forward of each layer. By layer, scores therefore
    telescope: their sum is :math:`\log p(w|h^L) - \log p(w|0)`, and without the embedding's
    :math:`\log p(w|h^L) - \log p(w|h^0)`, under every rule for the norm. Heads, sources and neurons
    are scored alone against the same :math:`h`, so that theirs do not add up to their layer's;
    `gaps` says by how much. Their vectors do: b_O, b_out, b_post and the biases of norms on the
    way are a component of their own (``attn bias``, ``mlp bias``).

    With a foil :math:`f`, :math:`\log p(w) - \log p(f)` takes the place of :math:`\log p(w)`. The
    softmax cancels: with the norm frozen and single tokens, scores are then differences of logits,
    linear in the stream, and those of heads, sources and neurons do add up, with the biases, to
    their layer's; those of layers and the first entry of the trajectory (the logits of no stream
    at all, biases alone) to the model's own difference of logits. For sets
    :math:`p(w) = \sum_{u \in T} p(u)`. A soft cap of the logits or a masked-LM head is no linear
    map: sums by layer stay exact, those of heads and neurons have gaps.

    A `Direction` :math:`u` as the target takes the place of the tokens: scores are inner products
    :math:`\langle u, v \rangle` of what arrives at its point, after a norm with that norm frozen.
    Those of layers and the first entry of the trajectory add up to the model's own; those of every
    split, to their layer's.

    Several predictions, as of an answer of several tokens, take one pass; `summed` adds them up.

    In post-LN models (BERT, BART) the stream passes a norm after every sublayer. A part is then
    taken as it arrives after the last block, through the norms that follow it with their scales
    frozen; the state after a sublayer is the sum of what arrives of all parts so far.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        by: Into what the stream is split: ``"layer"`` (sublayers), ``"head"``, ``"position"`` (what
            all heads of a layer read from one source), ``"head_position"`` (the paper's
            value-output vectors), ``"expert"`` (what the neurons of an expert write, times the
            router's weight), ``"ff_neuron"`` (an activation times a row of W_out) or
            ``"attn_neuron"`` (``pattern * value`` of one source, head and dimension, times a row
            of W_O: one neuron is a component for each source). Padding and, in a causal model,
            later positions are no sources. Only what is split is in the result: attention by head
            and source, feed-forward by expert and neuron; ``"layer"`` has everything.
        norm: Rule for the final norm. ``"frozen"``: scale of the whole stream, no norm bias and
            no b_U (the authors' code). ``"frozen+beta"``: with both, so that the last state has
            the model's own log-probability. ``"recompute"``: the norm of each state, as the logit
            lens takes it. A masked-LM head is no norm: it is applied to every state in full.
        score: What a neuron's score is; ``"log_prob_increase"`` for everything else. The paper
            compares, with ``m`` the coefficient and ``v`` the neuron's vector (a row of W_out or
            W_O): ``"log_prob"`` (of ``m v`` alone), ``"prob_increase"``, ``"norm"`` (of ``v``),
            ``"coefficient"`` (``m``), ``"rank"`` (1 / rank of the target in the logits of ``v``),
            ``"coefficient_norm"`` (``|m| |v|``), ``"coefficient_rank"`` (``m`` / rank).
        dictionary: A `Dictionary`, or several. Features of a transcoder take the place of a block's
            neurons (``by="ff_neuron"``, ``mlp feature``); those of an SAE, with what they miss,
            that of everything that was written before. What they miss is a component (``mlp
            error``).
        k: Only so many components of each sentence, those with the largest scores; exactly the
            ones that computing all would give. None: all, and biases.
        max_bytes: Workspace, besides the pass, one number per neuron and source, the result and
            W_U.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask, padding and the like, see
            `Inputs`.

    Returns:
        `LogProbContributions`, scores [batch component] in nats; one row for each prediction. Of a
        direction, its ``score`` is ``"projection"`` and log-probabilities are inner products.

    Raises:
        InvalidInput: If an argument does not fit the model: an unknown target, a foil of
            another length, a position that is not there.
        UnsupportedModel: If the model has no vocabulary readout and a token is asked about.

    Cost: a forward pass and ``2 d d_vocab`` operations for each state and component, of a
    direction ``4 d``. With ``k``, where logits are linear in the stream (frozen norm, no masked-LM
    head, no soft cap), ``4 d d_vocab`` for each state and ``2 d d_vocab`` for each component whose
    bound is large (`vocabulary`; their number is in `evaluated`); the bounds themselves take what
    the components' vectors take, of neurons ``2 L d_mlp d``. All attention neurons: W_O's rows are
    multiplied with W_U once for all sources and sentences.
    """
    _require_neurons(by, score)
    given, answer = split_answer(input, inputs)
    if answer.foil is not None and score in ("prob_increase", "rank", "coefficient_rank"):
        raise InvalidInput(
            "this score knows no foil",
            f"score={score!r} with a foil",
            "'log_prob_increase', 'log_prob' or a score of the neuron alone",
            "Leave the foil out, or ask for the increase of the log-odds.",
        )
    if isinstance(answer.target, Direction) and score != "log_prob_increase":
        raise InvalidInput(
            "this score is one of tokens",
            f"score={score!r} of a direction",
            "the default: inner products with the direction",
            "Leave score out.",
        )
    with torch.no_grad():
        view = with_dictionaries(as_view(model), dictionary)
        asked = run_question(view, given, answer, by=by)
        parts = [
            contributions_to(some, by, answer.pos, norm, score, k)
            for some in asked.predictions(norm, max_bytes)
        ]
    result = join_rows(parts)
    return result if k is None else result.top(k)


def contributions_to(
    prediction: Prediction,
    by: By,
    pos: object = None,
    norm: NormRule = "frozen+beta",
    score: Score = "log_prob_increase",
    k: int | None = None,
) -> LogProbContributions:
    """Returns the contributions to some predictions; with ``k`` at least the best of each."""
    splits = _require_some(list(split_stream(prediction.stream, by)), by, prediction)
    bounded = score == "log_prob_increase" and k is not None
    if by in _NEURONS and (k is not None or score != "log_prob_increase"):
        # What a dictionary misses is no neuron.
        splits = [split for split in splits if split.neurons is not None]
    if k is not None and bounded and not prediction.vocabulary.nonlinear:
        found = _best(prediction, splits, k)
    else:
        found = _all(prediction, splits, score)
    if prediction.reading is not None:
        found = replace(found, logits=found.logits * torch.nan)
    note = prediction.vocabulary.nonlinear if bounded else ""
    return LogProbContributions(
        **vars(found),
        by=by,
        score=score if prediction.reading is None else "projection",
        norm=norm,
        steps=prediction.steps,
        log_prob=prediction.log_prob,
        possible=_possible(splits),
        note=f"All of them, as there is no bound: {note}." if note else "",
        pos=prediction.stream.rows.cpu(),
        target=prediction.target,
        foil=prediction.foil,
        sentence=prediction.question.sentences,
        tokens=prediction.tokens,
        encoder=prediction.encoder,
        provenance=prediction.forward_pass.provenance(
            "log_prob_contributions",
            {"by": by, "pos": pos, "norm": norm, "score": score, "k": k},
        ),
    )


@dataclass(frozen=True)
class _Found:
    """Scores and what belongs to them, all splits side by side."""

    scores: Tensor
    coefficients: Tensor
    logits: Tensor
    components: Components
    trajectory: Tensor
    gaps: Tensor
    evaluated: Tensor


def _all(prediction: Prediction, splits: list[Split], score: Score) -> _Found:
    """Returns the scores of every component, biases included."""
    each, trajectory = _scores(prediction, splits, score)
    columns: dict[str, list[Tensor]] = {"scores": [], "coefficients": [], "logits": []}
    labels, gaps = [], torch.full_like(trajectory, torch.nan)
    parts, vocabulary = torch.zeros_like(trajectory), prediction.vocabulary
    for split, (found, *biases) in zip(splits, each, strict=True):
        found = found.masked_fill(~beside(found, split.there), torch.nan)
        step = split.step + 1
        parts[:, step] += found.nansum(dim=1)
        columns["scores"].append(found)
        columns["coefficients"].append(beside(found, split.coefficients).to(found.dtype))
        columns["logits"].append(_logits(prediction, split))
        labels.append(split.grid.table())
        for bias in biases:
            assert split.bias is not None
            grid, vector = split.bias
            columns["scores"].append(bias)
            columns["coefficients"].append(torch.full_like(bias, torch.nan))
            columns["logits"].append(vocabulary.target_logits(vector))
            labels.append(grid.table())
            gaps[:, step] = trajectory[:, step] - trajectory[:, step - 1] - parts[:, step]
            gaps[:, step] -= bias[:, 0]
    together = {name: torch.cat(column, dim=1) for name, column in columns.items()}
    return _Found(
        **together,
        components=join(labels),
        trajectory=trajectory,
        gaps=gaps,
        evaluated=_possible(splits),
    )


def _best(prediction: Prediction, splits: list[Split], k: int) -> _Found:
    """Returns the components with the largest scores alone; tables of all are never made."""
    rows = range(len(prediction.log_prob))
    states, vocabulary = prediction.stream.states, prediction.vocabulary
    best = [best_components(vocabulary, states[row], splits, k, row) for row in rows]

    def side_by_side(name: str, nothing: int | float) -> Tensor:
        columns = [getattr(one, name) for one in best]
        return pad_sequence(columns, batch_first=True, padding_value=nothing)

    scores = side_by_side("score", torch.nan)
    which, place = side_by_side("split", -1), side_by_side("place", 0)
    components = padding(*which.shape)
    coefficients, logits = torch.full_like(scores, torch.nan), torch.full_like(scores, torch.nan)
    for index in sorted({*which.flatten().tolist()} - {-1}):
        split, mine = splits[index], which == index
        inside = place.clamp(max=split.grid.count - 1)
        components = components.fill(mine.cpu(), split.grid.at(inside))
        logits = torch.where(mine, vocabulary.target_logits(split.written(inside)), logits)
        own = split.coefficients.to(inside.device).gather(1, inside)
        coefficients = torch.where(mine, own, coefficients)
    return _Found(
        scores,
        coefficients,
        logits,
        components,
        torch.stack([one.trajectory for one in best]),
        torch.full((len(best), len(prediction.steps)), torch.nan).to(logits),
        torch.tensor([one.evaluated for one in best]),
    )


def _possible(splits: list[Split]) -> Tensor:
    # Where something is read from sources is where the model is.
    device = next((one.read.device for one in splits if one.read is not None), None)
    return torch.stack([split.possible.to(device) for split in splits]).sum(dim=0).cpu()


def _logits(prediction: Prediction, split: Split) -> Tensor:
    """Returns the target's logit of each component, before the softmax."""
    vocabulary = prediction.vocabulary
    if split.neurons is None:
        assert split.vectors is not None
        return vocabulary.target_logits(split.vectors())
    if split.neurons.silent:
        return torch.zeros_like(split.neurons.coefficients).flatten(1)
    each = vocabulary.target_logits_shared(split.neurons.vectors(slice(None)))
    return (split.neurons.coefficients * each[:, None]).flatten(1)


def _scores(
    prediction: Prediction, splits: list[Split], score: Score
) -> tuple[list[Increases], Tensor]:
    """Returns the scores of each split's components, and the log-probability at every state."""
    if score == "log_prob_increase":
        return log_prob_increases(prediction, splits)

    def each(vocabulary: Vocabulary) -> Iterator[Increases]:
        read = replace(prediction, vocabulary=vocabulary)
        for split in progress(splits, "log_prob_contributions"):
            yield (_neuron_scores(read, split, score),)

    vocabulary = prediction.vocabulary
    return vocabulary.within_reach(each), vocabulary.target_log_probs(prediction.stream.states)


def _neuron_scores(prediction: Prediction, split: Split, score: Score) -> Tensor:
    neurons, vocabulary = split.neurons, prediction.vocabulary
    assert neurons is not None
    activations = neurons.activations.flatten(1)
    sources = neurons.activations.shape[1]
    if score == "coefficient":
        return activations
    if score in ("norm", "coefficient_norm"):
        size = neurons.rows.norm(dim=-1).repeat(sources).expand_as(activations)
        return size.clone() if score == "norm" else activations.abs() * size
    if score in ("rank", "coefficient_rank"):
        vectors, divisor = neurons.vectors(slice(None)), neurons.path.scale
        ranks = [vocabulary.ranks(vectors / divisor[row], row) for row in range(len(divisor))]
        found = 1 / torch.stack(ranks).repeat(1, sources)
        return found if score == "rank" else activations * found
    states = prediction.stream.states
    base = states[:, split.step] if score == "prob_increase" else torch.zeros_like(states[:, 0])
    gained = vocabulary.neuron_gains(base, neurons.vectors, neurons.coefficients).flatten(1)
    before = vocabulary.target_log_probs(base[:, None])
    return before + gained if score == "log_prob" else before.exp() * torch.expm1(gained)


def _require_neurons(by: str, score: str) -> None:
    if by in _NEURONS or score == "log_prob_increase":
        return
    raise InvalidInput(
        f"there is no such choice by {by}",
        f"score={score!r}",
        "scores other than log_prob_increase by 'ff_neuron' or 'attn_neuron'",
        "Leave score out.",
    )


def _require_some(splits: list[Split], by: str, prediction: Prediction) -> list[Split]:
    if not splits:
        ff = prediction.view.blocks()[0].feed_forward
        seen = "blocks without a feed-forward sublayer" if ff is None else "none before this point"
        raise InvalidInput(
            f"{prediction.view.name} has no components by {by}",
            "feed-forward blocks without experts" if by == "expert" else seen,
            "another `by`, or a later point of the stream",
            "By 'layer' there is always the embedding.",
        )
    return splits
