"""The query side: which earlier components activate the neurons that write an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import Answer, AnswerInputs, split_answer
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.residual_stream import AttentionComponent, FeedForwardComponent
from tl_contextmix.core.tiled_logits import NormRule
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.log_prob_scores import By, Prediction, Split, run_question, split_stream
from tl_contextmix.engine.neuron_inputs import NeuronInputs, Place, neuron_inputs_at, place_of
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.engine.selection import Chosen, chosen_components
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.log_prob.attention_edges import score_contributions
from tl_contextmix.results import LogProbContributions, QueryContributions, ScoreContributions
from tl_contextmix.results.axes import largest
from tl_contextmix.results.components import Components, finest, join, of_encoder, padding

Share = Literal["exact", "ratio"]
Edge = tuple[int, int, int, int]
VANISHING = (
    "log_prob_increase",
    "prob_increase",
    "coefficient",
    "coefficient_norm",
    "coefficient_rank",
    "projection",
)
"""Scores that a neuron without an activation does not have."""


def _papers(options: Mapping[str, Any]) -> tuple[str, ...]:
    scores = () if "share" in options else ("kamath2025attention",)
    return scores if "edge" in options else ("yu2024neuron", *scores)


@overload
def query_contributions(
    model: object,
    input: Input,
    *,
    neurons: Chosen,
    by: By = "layer",
    share: Share = "exact",
    k: Positive | None = None,
    norm: NormRule = "frozen+beta",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> QueryContributions: ...


@overload
def query_contributions(
    model: object,
    input: Input,
    *,
    edge: Edge,
    stack: StackName | None = None,
    by: By = "layer",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ScoreContributions: ...


@method(cites=_papers)
def query_contributions(
    model: object,
    input: Input,
    *,
    neurons: Chosen | None = None,
    edge: Edge | None = None,
    stack: StackName | None = None,
    by: By = "layer",
    share: Share = "exact",
    k: Positive | None = None,
    norm: NormRule = "frozen+beta",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> QueryContributions | ScoreContributions:
    r"""Returns which components activate some neurons, or why a head looks where it does.

    A neuron's pre-activation is an exact sum over everything written to the stream it reads,

    .. math:: z = \sum_c \frac{C(c)\gamma \cdot k}{s} + \beta \cdot k + b

    with :math:`k` its key (a column of W_in, or of W_V for an attention neuron, which reads the
    stream of its *source*), and with the norm's scale frozen. `inner` are these products. The
    activation's share of each is ``slope * inner``, the slope being the secant of the activation
    from zero (integrated gradients in closed form; in gated blocks both branches have one), the
    attention weight for attention neurons. A component's score is its share of each neuron's
    activation times the neuron's own score, added up over the neurons. That score has to vanish
    with the activation, as the log-probability increase does: of a norm or a rank, which a silent
    neuron has, too, shares have any size, and are refused. The neuron's own bias and that of its
    norm (`constant`) are no component of the stream: the scores of all components add up to those
    of the neurons less the constants' share.

    ``share="ratio"`` is the authors' code instead (2024, section 3.4): products without mean, scale
    and biases, divided by their own sum. That sum can be close to zero or negative while the
    neuron is active: shares then have any size and the wrong sign. For comparison only.

    With ``edge=(layer, head, target, source)`` the score of an attention edge before the softmax,
    bilinear in the streams of both positions, is an exact sum over pairs of components (Kamath et
    al. 2025 sum over pairs of features):

    .. math:: s_{ij} = \hat q_i^\top M_{ij} \hat k_j + p_{ij}
              = \sum_{a, b} \hat q_{i,a}^\top M_{ij} \hat k_{j,b} + p_{ij}

    with :math:`\hat q_{i,a}` what component :math:`a` of the target's stream makes of the query,
    :math:`\hat k_{j,b}` likewise of the source's and the key, the scales of the norm before the
    head and of norms of queries and keys (Qwen 3, Gemma 3, OLMo 2) frozen at their real values,
    :math:`M_{ij}` the factor of the scores and the rotation between the positions, and
    :math:`p_{ij}` what positions add (ALiBi, relative biases). A soft cap comes after the sum.
    :math:`M` and :math:`p` are measured at the model, with known queries and keys in the place of
    its own. Attention is cut as ``by`` says (not into neurons), all else are sublayers.

    Args:
        model: Any TransformerLens model; for neurons one with a vocabulary readout.
        input: The same text, texts or token ids the neurons were found on.
        neurons: The neurons: a result of `log_prob_contributions` (by ``"ff_neuron"`` or
            ``"attn_neuron"``) or of this function (a chain: what activates what activates),
            usually its ``.top(k)``; or one or several ``(layer, neuron)``, or labels such as
            ``"L3N120"``, weighted by their log-probability increase of the target, or by what they
            write along a direction.
        edge: Layer, head, target and source of an attention edge, instead of neurons; negative
            numbers count from the end.
        stack: The edge's stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder
            (default: the decoder).
        by: Into what the streams are split; see `log_prob_contributions`.
        share: ``"exact"`` or ``"ratio"``.
        k: Only so many components, those with the largest scores; None: all. All neurons as
            components of many neurons are a large table.
        norm: Rule for the final norm, for neurons given as a list.
        max_bytes: Workspace.
        **inputs: ``target``, ``foil`` and ``pos`` for neurons given as a list, see `Asked` (None:
            what was asked where they were found); mask, padding and the like, see `Inputs`.

    Returns:
        `QueryContributions`; of an edge `ScoreContributions`.

    Raises:
        InvalidInput: If an argument does not fit the model, an attention neuron has no source, or a
            head cannot look at the source of an edge.
        UnsupportedModel: If the model has no vocabulary readout, or an activation has no slope. Of
            an edge: if queries or keys are no linear maps of the stream at frozen norms, or the
            score is no bilinear form of them.

    Cost: a forward pass, and for each stream that is read ``2 S d`` operations per component, S
    neurons: ``2 S d_mlp d`` per layer by ``"ff_neuron"``. Cross-attention neurons read the
    encoder's stream, whose components are named ``encoder ...``. An edge: two passes, the second
    up to its layer, over 5 copies of the text; with rotations another one over ``1.5 d_head / H``
    more, H heads.
    """
    if edge is not None:
        with torch.no_grad():
            given, answer = split_answer(input, inputs)
            _require_edge_alone(neurons, answer, (share, k, norm) == ("exact", None, "frozen+beta"))
            return score_contributions(
                as_view(model), given, edge, by=by, stack=stack, max_bytes=max_bytes
            )
    if neurons is None or stack is not None:
        raise InvalidInput(
            "there is nothing to ask about" if neurons is None else "neurons have no stack",
            f"neurons={neurons!r}"[:80] if neurons is None else f"stack={stack!r}",
            "neurons=, or edge=(layer, head, target, source) with its stack",
            "Name one of them.",
        )
    _require_vanishing(neurons, share)
    view = as_view(model)
    with torch.no_grad():
        given, answer = split_answer(input, inputs)
        asked = run_question(
            view,
            given,
            answer,
            by=by,
            needs=frozenset({"mixing"}),
            about=neurons,
            both_stacks=True,
        )
        prediction = asked.prediction(norm, max_bytes)
        chosen = chosen_components(view, neurons, None, prediction.stream.rows.cpu())
        _require_sources(chosen)
        weights = _weights(prediction, neurons, chosen)
        rows = [
            _row(prediction, chosen, weights[row], row, by, share, k) for row in range(len(weights))
        ]
    width = max(len(row.scores) for row in rows)
    if not width:
        raise _nothing_read(chosen, by)
    columns = [join([row.components, padding(1, width - len(row.scores))]) for row in rows]

    def stacked(name: str) -> Tensor:
        some = [getattr(row, name) for row in rows]
        wide = max(one.shape[-1] for one in some)
        return torch.stack([pad(one, (0, wide - one.shape[-1]), value=torch.nan) for one in some])

    names = ("scores", "inner", "linear", "shares", "pre", "activation", "constant")
    return QueryContributions(
        **{name: stacked(name) for name in names},
        components=Components(
            **{name: torch.cat([getattr(c, name) for c in columns]) for name in vars(columns[0])}
        ),
        by=by,
        share=share,
        neurons=chosen,
        weights=weights,
        tokens=prediction.tokens,
        encoder=prediction.encoder,
        sentence=prediction.question.sentences,
        provenance=prediction.forward_pass.provenance(
            "query_contributions",
            {"by": by, "share": share, "k": k, "pos": answer.pos},
            neurons=finest(chosen),
        ),
    )


def _require_edge_alone(neurons: object, answer: Answer, plain: bool) -> None:
    """Raises InvalidInput where an edge is asked about together with something else."""
    if neurons is None and answer.empty and plain:
        return
    raise InvalidInput(
        "an edge is asked about alone",
        "neurons=" if neurons is not None else "target=, foil=, pos=, share=, k= or norm=",
        "edge=, stack= and by=",
        "A score is no matter of what is predicted, and all of its parts are returned.",
    )


@dataclass(frozen=True)
class _Row:
    """What was found for one sentence, by the names of `QueryContributions`."""

    scores: Tensor
    components: Components
    inner: Tensor
    linear: Tensor
    shares: Tensor
    pre: Tensor
    activation: Tensor
    constant: Tensor


@dataclass(frozen=True)
class _Group:
    """Neurons of one sentence that read the same stream, and what they read of each component."""

    some: list[int]
    inputs: NeuronInputs
    components: Components
    inner: Tensor
    linear: Tensor
    shares: Tensor
    ratios: Tensor


def _row(
    prediction: Prediction,
    chosen: Components,
    weights: Tensor,
    row: int,
    by: By,
    share: Share,
    k: int | None,
) -> _Row:
    places: dict[tuple[Place, tuple[str, int]], list[int]] = {}
    # A neuron without a score is empty, or reads a source that is not read.
    for index in [index for index, empty in enumerate(weights.isnan()) if not empty]:
        place = place_of(prediction.view, chosen, row, index)
        kind = chosen.at(row, index)["kind"], int(chosen.layer[row, index])
        places.setdefault((place, kind), []).append(index)
    groups = [
        _group(prediction, chosen, row, place, some, by, share)
        for (place, _), some in places.items()
    ]
    labels = join([padding(1, 0), *(group.components for group in groups)])
    keys, where = labels.numbers()[0].unique(return_inverse=True)
    wheres = where.split([group.components.kind.shape[1] for group in groups])
    scores = weights.new_zeros(len(keys))
    for group, at in zip(groups, wheres, strict=True):
        scores.index_add_(0, at.to(scores.device), group.ratios @ weights[group.some])
    kept = torch.arange(len(keys))
    if k is not None:
        bias = torch.zeros(len(keys), dtype=torch.bool).scatter(0, where, labels.is_bias()[0])
        kept = largest(scores.masked_fill(bias.to(scores.device), torch.nan), k)
    return _collect(groups, wheres, scores, kept.to(scores.device), len(weights))


def _group(
    prediction: Prediction,
    chosen: Components,
    row: int,
    place: Place,
    some: list[int],
    by: By,
    share: Share,
) -> _Group:
    view = prediction.view
    sentence = int(prediction.question.sentences[row])
    trace = prediction.forward_pass.trace.part(slice(sentence, sentence + 1))
    inputs = neuron_inputs_at(view, trace, place, chosen, row, some)
    splits = list(split_stream(inputs.stream, by))
    labels = join([padding(1, 0), *(label for split in splits for label in _labels(split))])
    if place.stack != view.base_stack(None):
        labels = of_encoder(labels)
    first, *more = (_inner(inputs, splits, branch) for branch in range(len(inputs.keys)))
    shares = inputs.shares((first, *more))
    divisor = inputs.activation
    if share == "ratio":
        ratios = _inner(inputs, splits, None) / inputs.uncentred(inputs.stream.total)
    else:
        # A neuron that is not active has no score to share.
        ratios = torch.where(divisor == 0, 0, shares / torch.where(divisor == 0, 1, divisor))
    linear = more[0] if more else torch.full_like(first, torch.nan)
    return _Group(some, inputs, labels, first, linear, shares, ratios)


def _labels(split: Split) -> list[Components]:
    """Returns the components of a split that are there in its only sentence, and its bias."""
    labels = split.grid.at(split.there[0].nonzero().T.cpu())
    return [labels] if split.bias is None else [labels, split.bias[0].table()]


def _inner(
    inputs: NeuronInputs, splits: list[Split], branch: int | None
) -> Float[Tensor, "component neuron"]:
    """Returns the inner products of what `_labels` names; the authors' where there is no branch."""
    found = [inputs.keys[0].new_zeros(0, inputs.keys[0].shape[1])]  # layer 0 reads no neurons
    for split in splits:
        found.append(inputs.inner_of(split, branch)[split.there[0]])
        if split.bias is not None:
            found.append(inputs.product(split.bias[1][0], branch))
    return torch.cat(found)


def _collect(
    groups: list[_Group],
    wheres: tuple[Tensor, ...],
    scores: Tensor,
    kept: Tensor,
    neurons: int,
) -> _Row:
    """Returns the components that are kept, with what each neuron reads of them."""
    place = torch.full((len(scores),), -1, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    nothing = scores.new_full((neurons, len(kept)), torch.nan)
    tables = {name: nothing.clone() for name in ("inner", "linear", "shares")}
    names = ("pre", "activation", "constant")
    figures = {name: scores.new_full((neurons,), torch.nan) for name in names}
    columns = {name: empty.clone() for name, empty in vars(padding(1, len(kept))).items()}
    for group, where in zip(groups, wheres, strict=True):
        at = place[where.to(place.device)]
        seen = at >= 0
        some = torch.tensor(group.some, device=kept.device)
        for name, table in tables.items():
            table[some[:, None], at[seen]] = getattr(group, name)[seen].T
        figures["pre"][some] = group.inputs.pre[0]
        figures["activation"][some] = group.inputs.activation
        figures["constant"][some] = group.inputs.constants[0]
        for name, column in columns.items():
            column[0, at[seen].cpu()] = getattr(group.components, name)[0, seen.cpu()]
    return _Row(scores[kept], Components(**columns), **tables, **figures)


def _weights(prediction: Prediction, neurons: Chosen, chosen: Components) -> Tensor:
    """Returns the scores of the neurons themselves."""
    if isinstance(neurons, (LogProbContributions, QueryContributions)):
        return neurons.scores.to(prediction.log_prob)
    stream, components = prediction.stream, prediction.stream.components
    sublayers = [(component.kind, component.layer) for component in components]
    steps, vectors = [], []
    for index in range(chosen.kind.shape[1]):
        one = chosen.at(0, index)
        if (one["kind"], one["layer"]) not in sublayers:
            raise InvalidInput(
                "these neurons write nothing along the direction",
                f"{chosen.label(0, index)}, which does not come before this point",
                "neurons before it",
                "Ask about neurons of earlier layers.",
            )
        steps.append(sublayers.index((one["kind"], one["layer"])))
        component = components[steps[-1]]
        assert isinstance(component, (AttentionComponent, FeedForwardComponent))
        if isinstance(component, FeedForwardComponent):
            written = dict(component.neurons())[one["expert"]]
        else:
            written = component.neurons()
        number = torch.tensor([one["neuron"]])
        vectors.append(written.coefficients[:, 0, number, None] * written.vectors(number))
    read = sorted({*steps})
    at, together = [read.index(step) for step in steps], torch.cat(vectors, dim=1)
    ((found, _),) = prediction.vocabulary.within_reach(
        lambda vocabulary: [vocabulary.gains_at(stream.states[:, read], at, together)]
    )
    return found


def _nothing_read(chosen: Components, by: str) -> InvalidInput:
    row, place = (~chosen.is_empty()).nonzero()[0].tolist()
    return InvalidInput(
        f"these neurons read no components by {by}",
        f"neurons such as {chosen.label(row, place)}, with nothing of that kind before them",
        "neurons of later layers, or another `by`",
        "By 'layer' there is always the embedding.",
    )


def _require_vanishing(neurons: object, share: str) -> None:
    """Raises InvalidInput where shares of an activation cannot be shares of a score."""
    score = neurons.score if isinstance(neurons, LogProbContributions) else VANISHING[0]
    if share == "exact" and score not in VANISHING:
        raise InvalidInput(
            "scores that silent neurons have cannot be shared out by activation",
            f"neurons scored by {score!r}",
            f"scores that vanish with the activation: {', '.join(VANISHING)}",
            "Score the same neurons so: give a list of (layer, neuron), or share='ratio'.",
        )


def _require_sources(chosen: Components) -> None:
    lacking = ~chosen.of_kind("mlp") & ~chosen.of_kind("encoder mlp") & ~chosen.is_empty()
    lacking &= (chosen.source < 0) | (chosen.neuron < 0)
    if bool(lacking.any()):
        row, place = lacking.nonzero()[0].tolist()
        raise InvalidInput(
            "it is not known which stream this component reads",
            chosen.label(row, place),
            "feed-forward neurons, or attention neurons with their source",
            "Take attention neurons from a result by 'attn_neuron'.",
        )
