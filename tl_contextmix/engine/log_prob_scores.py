"""A prediction, the stream it is read from, split into the components that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.adapters.inputs import Given, name_tokens, read_batch
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.adapters.questions import (
    Answer,
    Direction,
    Question,
    Reading,
    ask,
    label_sets,
    read_direction,
)
from tl_contextmix.adapters.verification import tolerance_of
from tl_contextmix.core.blocks import Identity, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.residual_stream import (
    AttentionComponent,
    Component,
    FeedForwardComponent,
    Neurons,
    OpaqueComponent,
    Stream,
    decompose_stream,
    needed,
)
from tl_contextmix.core.tiled_logits import Distributions, NormRule, Vocabulary, read_vocabulary
from tl_contextmix.core.token_sums import beside, blocks
from tl_contextmix.errors import InvalidInput, UnsupportedModel, seen
from tl_contextmix.results import Tokens
from tl_contextmix.results.components import Grid

By = Literal["layer", "head", "position", "head_position", "expert", "ff_neuron", "attn_neuron"]
SPLITS: tuple[By, ...] = get_args(By)
# What has to hold of a pass that hooks edited for components to add up to their sublayer.
_SOURCES: frozenset[Identity] = frozenset({"block", "attn", "mixing"})
_NEEDS: dict[By, frozenset[Identity]] = {
    "layer": frozenset({"block"}),
    "head": frozenset({"block", "attn"}),
    "position": _SOURCES,
    "head_position": _SOURCES,
    "attn_neuron": _SOURCES,
    "expert": frozenset({"block", "mlp"}),
    "ff_neuron": frozenset({"block", "mlp"}),
}
# A score that lies within a few roundings of a bound is not decided by it.
_SLACK = 64


@dataclass(frozen=True)
class Prediction:
    """Why does the model give this token, rather than that one, at this position?

    What it holds has a row for each prediction; a sentence may be asked about at several positions.

    Attributes:
        forward_pass: The pass.
        question: What was asked.
        stream: The residual stream that each answer is read from.
        vocabulary: How it is read.
        log_prob: The target's log-probability, less the foil's, as the model itself gives it; of a
            direction, its inner product with the stream.
        reading: The direction, where that is the target.
    """

    forward_pass: Pass
    question: Question
    stream: Stream
    vocabulary: Vocabulary
    log_prob: Float[Tensor, " batch"]
    reading: Reading | None = None

    @property
    def view(self) -> ModelView:
        """The model."""
        return self.forward_pass.view

    @property
    def target(self) -> Tokens:
        """The token asked about in each row, or the alternatives side by side; or a direction."""
        if self.reading is not None:
            return self.reading.label(len(self.log_prob))
        return label_sets(self.view, self.vocabulary.asked.target)

    @property
    def foil(self) -> Tokens | None:
        """What it is contrasted with, or None."""
        foil = self.vocabulary.asked.foil
        return None if foil is None or self.reading is not None else label_sets(self.view, foil)

    @property
    def tokens(self) -> Tokens:
        """The tokens of the stack that writes the answer, of each row's sentence."""
        return self._of_rows(self.forward_pass.target)

    @property
    def encoder(self) -> Tokens | None:
        """The tokens that cross-attention reads, or None."""
        if self.stream.stack != "decoder" or "encoder" not in self.forward_pass.tokens:
            return None
        return self._of_rows(self.forward_pass.tokens["encoder"])

    def _of_rows(self, tokens: Tokens) -> Tokens:
        if self.question.plain:
            return tokens
        return tokens.select(self.question.sentences.tolist(), [*range(tokens.shape[1])])

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the states of the stream."""
        names = [w.kind if w.layer < 0 else f"L{w.layer} {w.kind}" for w in self.stream.components]
        return ("nothing", *names)


@dataclass(frozen=True)
class AskedPass:
    """A pass, and the predictions of it, or positions, that are asked about."""

    forward_pass: Pass
    question: Question
    reading: Reading | None = None

    def predictions(self, norm: NormRule, max_bytes: int) -> Iterator[Prediction]:
        """Yields the predictions, as many at a time as fit.

        Args:
            norm: Rule for the final norm.
            max_bytes: Workspace.

        Raises:
            UnsupportedModel: If the stream is no sum, or hooks of the user's own change what is
                read from it.
        """
        view, batch = self.forward_pass.view, self.question.batch
        count, fit = len(self.question.rows), len(self.question.rows)
        if not self.question.plain:
            # What attention reads, of all layers, and a distribution.
            d_model = self.forward_pass.trace.resid_in(view.blocks()[0]).shape[-1]
            sources = sum(side.ids.shape[1] for side in (batch.main, batch.decoder) if side)
            numbers = len(view.blocks()) * sources * d_model + view.d_vocab
            fit = max(1, max_bytes // (numbers * view.dtype.itemsize))
        for some in blocks(count, fit):
            yield self.prediction(norm, max_bytes, self.question.part(some))

    def prediction(
        self, norm: NormRule, max_bytes: int, question: Question | None = None
    ) -> Prediction:
        """Returns all predictions at once, or those of a part of the question."""
        question = question or self.question
        view, trace, reading = self.forward_pass.view, self.forward_pass.trace, self.reading
        stream = decompose_stream(
            view,
            trace,
            question.stack,
            question.rows,
            sentences=question.sentences,
            stop=None if reading is None else reading.stop,
        )
        readout = view.readout if reading is None else reading.readout
        logits = _logits(question, trace, stream) if reading is None else readout(stream.total)
        asked = question.contrast(logits)
        vocabulary = read_vocabulary(readout, norm, stream.total, asked, max_bytes)
        score = asked.score(logits)
        return Prediction(self.forward_pass, question, stream, vocabulary, score, reading)


def run_question(
    view: ModelView,
    given: Given,
    answer: Answer,
    *,
    by: By = "layer",
    needs: frozenset[Identity] = frozenset(),
    about: object = None,
    both_stacks: bool = False,
) -> AskedPass:
    """Runs the model once and returns what it was asked.

    Args:
        view: The model.
        given: Its input.
        answer: Which predictions.
        by: Into what the stream is to be split.
        needs: What else has to hold of a pass that hooks edited.
        about: Components that the predictions are about, see `ask`.
        both_stacks: Whether the encoder's activations are needed, too, where there are two.

    Raises:
        InvalidInput: If an argument does not fit the model, or the components another input.
        UnsupportedModel: If it has no vocabulary readout and a token is asked about.
    """
    view = name_tokens(view, given.labels)
    reading = None
    if isinstance(answer.target, Direction):
        reading = read_direction(view, answer.target)
        _require_direction_alone(answer)
        answer = replace(answer, target=None)
    else:
        view.readout.require()
    question = ask(view, read_batch(view, given), answer, about)
    question = question if reading is None else question.of_direction()
    return run_predictions(
        question, given, by, needs=needs, both_stacks=both_stacks, reading=reading
    )


def _require_direction_alone(answer: Answer) -> None:
    if answer.foil is not None:
        raise InvalidInput(
            "a direction has no foil",
            f"foil={seen(answer.foil)}",
            "no foil",
            "Ask for the difference of two directions: subtract their vectors.",
        )
    if answer.generate is not None:
        raise InvalidInput(
            "what a model generates is a target of its own",
            f"generate={seen(answer.generate)} with a direction",
            "one of them",
            "Give the whole text, and its positions as pos=.",
        )


def run_predictions(
    question: Question,
    given: Given,
    *by: By,
    needs: frozenset[Identity] = frozenset(),
    both_stacks: bool = False,
    reading: Reading | None = None,
) -> AskedPass:
    """Runs the model once on a question.

    Args:
        question: The question.
        given: The input that it was asked of.
        *by: Into what the stream is to be split.
        needs: See `run_question`.
        both_stacks: Likewise.
        reading: How a direction is read from the stream; None for tokens.
    """
    view = question.view
    stack = view.base_stack(None)
    read = dict(view.stacks) if both_stacks else {stack: view.stacks[stack]}
    needs = needs.union(*(_NEEDS[one] for one in by))
    if reading is not None:
        read[stack] = read[stack][: reading.stop.layer + 1]
        needs |= reading.needs
    names = [
        name
        for each in read.values()
        for block in each
        for name in (*block.points(), *needed(block))
    ]
    forward_pass = run_pass(
        view,
        given,
        layer=range(len(read[stack])),
        also=lambda block: () if block.layer else names,
        needs=needs,
        batch=question.batch,
        logits=bool(view.hooked()) or (reading is None and _is_coarse(view)),
    )
    return AskedPass(forward_pass, question, reading)


def _is_coarse(view: ModelView) -> bool:
    """Whether the model rounds more than the maths: what it says is then taken from itself."""
    return view.tolerance > tolerance_of({view.dtype}, torch.device("cpu"))


def _logits(question: Question, trace: Trace, stream: Stream) -> Float[Tensor, "row d_vocab"]:
    """Returns what the model says at the positions asked about.

    It is read from its last stream where that is the same but for rounding, and the pass has ended
    there: the model would read all positions.
    """
    view = question.view
    if trace.logits is None:
        return question.require(view.readout(stream.total))
    logits = question.read(trace.logits)
    require_read(view, stream.total, logits)
    return logits


def require_read(
    view: ModelView, stream: Float[Tensor, "row d_model"], logits: Float[Tensor, "row d_vocab"]
) -> None:
    """Raises UnsupportedModel where hooks of the user's own change what the stream is read as.

    Args:
        view: The model.
        stream: Its last stream.
        logits: What it says itself.
    """
    hooked = view.hooked()
    if not hooked:
        return
    error = float((view.readout(stream) - logits).abs().max() / logits.abs().max())
    if not error <= view.tolerance:
        raise UnsupportedModel(
            f"hooks of your own change what {view.name} reads from its stream",
            f"{', '.join(hooked[:3])}, and logits with a relative error of {error:.2g}",
            f"at most {view.tolerance:.0e}",
            "Take off hooks on the final norm and on the unembedding: they are not followed.",
        )


@dataclass(frozen=True)
class Split:
    """One component split into components.

    Attributes:
        step: Place of the component in the stream.
        grid: The components.
        vectors: Returns what each writes [batch component d_model], in some sentences and of
            some components, computed when it is asked for; None where they are neurons.
        neurons: The neurons, source by source, or None.
        bias: What none of the component's components writes and its vector, or None.
        read: Which sources can be read, where the components differ in them, or None. Padding and
            what comes later in a causal model are not there.
    """

    step: int
    grid: Grid
    vectors: Callable[..., Tensor] | None = None
    neurons: Neurons | None = None
    bias: tuple[Grid, Tensor] | None = None
    read: Bool[Tensor, "batch source"] | None = None

    @property
    def there(self) -> Bool[Tensor, "batch component"]:
        """Which of the components are there in each sentence."""
        count = self.grid.count
        if self.read is None:
            return torch.ones(len(self.grid.pos), count, dtype=torch.bool)
        each = count // self.read.shape[1]  # the source is the first axis, if not the only one
        return self.read.repeat_interleave(each, dim=1)

    @property
    def possible(self) -> Int[Tensor, " batch"]:
        """How many are there in each sentence."""
        return self.there.sum(dim=1)

    @property
    def coefficients(self) -> Float[Tensor, "batch component"]:
        """Activations of the neurons; NaN of other components."""
        if self.neurons is None:
            return torch.full((len(self.grid.pos), self.grid.count), torch.nan)
        return self.neurons.activations.flatten(1)

    def written(
        self, places: Int[Tensor, "batch some"], rows: slice = slice(None)
    ) -> Float[Tensor, "batch some d_model"]:
        """Returns what some components write, those of each sentence.

        Args:
            places: Their places.
            rows: The sentences.
        """
        if self.neurons is None:
            assert self.vectors is not None
            used, at = places.unique(return_inverse=True)
            found = self.vectors(rows, used)
            return found.gather(1, at[..., None].expand(*at.shape, found.shape[2]))
        numbers = self.neurons.coefficients[rows].flatten(1).gather(1, places)
        return numbers[..., None] * self.neurons.vectors(places % self.neurons.count)

    def bounds(
        self, slopes: Float[Tensor, "alternative d_model"], row: int
    ) -> Float[Tensor, " component"]:
        """Returns what the components of a sentence gain at most; -inf of those not there.

        Args:
            slopes: Gradients at the state, see `Vocabulary.slopes`.
            row: The sentence.
        """
        # Of several alternatives the one that gains most bounds what they gain together.
        if self.neurons is None:
            assert self.vectors is not None
            bound = (self.vectors(slice(row, row + 1))[0] @ slopes.T).amax(dim=1)
        elif self.neurons.silent:
            bound = torch.zeros_like(self.neurons.coefficients[row]).flatten()
        else:
            along = self.neurons.vectors(slice(None)) @ slopes.T
            numbers = self.neurons.coefficients[row]
            bound = torch.maximum(numbers * along.amax(dim=1), numbers * along.amin(dim=1))
            bound = bound.flatten()
        return bound.masked_fill(~self.there[row].to(bound.device), -torch.inf)


def split_stream(stream: Stream, by: By) -> Iterator[Split]:
    """Yields the components of a stream that can be split in a way, split.

    Args:
        stream: The stream.
        by: ``"layer"`` (sublayers as they are), ``"head"``, ``"position"`` (what all heads read
            from a source), ``"head_position"``, ``"expert"`` (what the neurons of an expert write,
            times the router's weight), ``"ff_neuron"`` or ``"attn_neuron"``.

    Raises:
        UnsupportedModel: If it is split by neurons of a sublayer whose neurons are not known.
    """
    rows = stream.rows.cpu()
    for step, component in enumerate(stream.components):
        yield from _split(component, by, step, rows)


def _split(component: Component, by: By, step: int, rows: Tensor) -> Iterator[Split]:
    """Yields a component's components; its bias comes with the last of them."""

    def grid(kind: str = component.kind, **axes: int | range) -> Grid:
        numbers = ((name, n if isinstance(n, range) else range(n)) for name, n in axes.items())
        return Grid(kind, component.layer, rows, tuple(numbers))

    missing = by == "ff_neuron" and component.kind.endswith("error")
    if by == "layer" or missing:
        yield Split(step, grid(), component.written)
    if by == "layer" or component.whole:
        return
    if by == "ff_neuron" and isinstance(component, OpaqueComponent):
        raise UnsupportedModel(component.refusal)
    bias = grid(f"{component.kind} bias"), component.bias[:, None]
    if isinstance(component, FeedForwardComponent):
        if by == "ff_neuron":
            every = list(component.neurons())
            for number, neurons in every:
                here = grid(neuron=neurons.count)
                if number is not None:
                    here = grid(expert=range(number, number + 1), neuron=neurons.count)
                last = bias if neurons is every[-1][1] else None
                yield Split(step, here, neurons=neurons, bias=last)
        elif by == "expert" and component.sublayer.routes:
            count = sum(1 for _ in component.sublayer.groups())
            yield Split(step, grid(expert=count), component.experts, bias=bias)
        return
    if not isinstance(component, AttentionComponent) or by in ("ff_neuron", "expert"):
        return
    heads, d_head, _ = component.weight.shape
    read, sources = component.read, component.pattern.shape[2]
    if by == "head":
        yield Split(step, grid(head=heads), component.heads, bias=bias)
    elif by == "position":
        yield Split(step, grid(source=sources), component.sources, bias=bias, read=read)
    elif by == "attn_neuron":
        every = grid(source=sources, head=heads, neuron=d_head)
        yield Split(step, every, neurons=component.neurons(), bias=bias, read=read)
    else:
        # One head at a time: all of them take [head, source, d_model].
        for one in range(heads):
            some = grid(head=range(one, one + 1), source=sources)
            last = bias if one == heads - 1 else None
            yield Split(step, some, partial(component.head_sources, one), bias=last, read=read)


Increases = tuple[Tensor, ...]
"""What a split's components add to the log-probability [batch component]; then its bias, if any."""


def log_prob_increases(
    prediction: Prediction, splits: list[Split]
) -> tuple[list[Increases], Float[Tensor, "batch step"]]:
    """Returns what each split's components add to the log-probability, and that at every state.

    Vectors are read together, those of as many splits as take an eighth of the workspace.
    """
    *found, (trajectory,) = prediction.vocabulary.within_reach(
        lambda vocabulary: _increases(replace(prediction, vocabulary=vocabulary), splits)
    )
    return found, trajectory


def _increases(prediction: Prediction, splits: list[Split]) -> Iterator[Increases]:
    """Yields the increases of each split, then the log-probability at every state."""
    states, vocabulary = prediction.stream.states, prediction.vocabulary
    if any(split.neurons is not None for split in splits):
        for split in progress(splits, "log_prob_contributions"):
            if split.neurons is not None:
                yield _neurons_increase(prediction, split)
            else:  # what a dictionary misses
                yield from _vectors_increase(prediction, [split], {split.step})[0]
        yield (vocabulary.target_log_probs(states),)
        return
    trajectory = torch.empty_like(states[..., 0])
    unread = {*range(states.shape[1])} - {split.step for split in splits}
    for some in _batches(splits, vocabulary.max_bytes // (8 * states[:, 0].nbytes)):
        steps = unread.union(split.step for split in some)
        unread = set()
        found, trajectory[:, sorted(steps)] = _vectors_increase(prediction, some, steps)
        yield from found
    yield (trajectory,)


def _batches(splits: list[Split], room: int) -> Iterator[list[Split]]:
    """Yields splits, as many at a time as have so many components, or one."""
    some: list[Split] = []
    for split in progress(splits, "log_prob_contributions"):
        if some and sum(one.grid.count + 1 for one in (*some, split)) > room:
            yield some
            some = []
        some.append(split)
    yield some


def _neurons_increase(prediction: Prediction, split: Split) -> Increases:
    assert split.neurons is not None
    base, neurons = prediction.stream.states[:, split.step], split.neurons
    found = torch.zeros_like(neurons.coefficients)
    if not neurons.silent:
        found = prediction.vocabulary.neuron_gains(base, neurons.vectors, neurons.coefficients)
    # Exactly: rounding would put silent neurons in some order.
    found = found.masked_fill(neurons.coefficients == 0, 0).flatten(1)
    if split.bias is None:
        return (found,)
    return found, prediction.vocabulary.gains(base, split.bias[1])


def _vectors_increase(
    prediction: Prediction, splits: list[Split], steps: set[int]
) -> tuple[list[Increases], Float[Tensor, "batch step"]]:
    """Returns the increases of splits, and the log-probability at some states, theirs included."""
    vectors, there, at = [], [], []
    read = sorted(steps)
    for split in splits:
        assert split.vectors is not None
        biases = [] if split.bias is None else [split.bias[1]]
        vectors += [split.vectors(), *biases]
        there += [split.there, *(torch.ones(len(bias), 1, dtype=torch.bool) for bias in biases)]
        at += [read.index(split.step)] * (split.grid.count + len(biases))
    together = torch.cat(vectors, dim=1)
    known = torch.cat([beside(together, one) for one in there], dim=1)
    if any(name == "expert" for split in splits for name, _ in split.grid.axes):
        # Experts that no sentence is routed to write nothing, which gains nothing.
        known &= together.any(dim=2)
    found, log_probs = prediction.vocabulary.gains_at(
        prediction.stream.states[:, read], at, together, known.cpu()
    )
    counts = [[split.grid.count] + [1] * (split.bias is not None) for split in splits]
    columns = iter(found.split([*chain(*counts)], dim=1))
    return [tuple(next(columns) for _ in each) for each in counts], log_probs


@dataclass(frozen=True)
class TopComponents:
    """The components with the largest scores of one sentence.

    Attributes:
        split: Which split each belongs to.
        place: Its place there.
        score: Its score, largest first.
        evaluated: How many scores were computed to be sure.
        trajectory: The target's log-probability, less the foil's, at every state.
    """

    split: Int[Tensor, " some"]
    place: Int[Tensor, " some"]
    score: Float[Tensor, " some"]
    evaluated: int
    trajectory: Float[Tensor, " step"]


def best_components(
    vocabulary: Vocabulary,
    states: Float[Tensor, "step d_model"],
    splits: list[Split],
    k: int,
    row: int,
) -> TopComponents:
    r"""Returns the components that gain most, without computing what all of them gain.

    They are visited in the order of Jensen's bound ``vector @ slope`` and scored
    in blocks until no bound that is left reaches the k-th score (see `vocabulary`). Linear
    readouts only. Cost: ``2 m d`` operations per sublayer for the bounds of its ``m`` components
    and ``2 d d_vocab`` per component evaluated; one number is kept per component.

    Args:
        vocabulary: How the stream is read.
        states: The states of the stream, in one sentence.
        splits: What they are components of.
        k: How many; fewer are returned where fewer are there.
        row: The sentence.
    """
    search = _Search(vocabulary, states, splits, row)
    bound = search.bounds()
    there = bound > -torch.inf
    count = int(there.sum())
    k = min(k, count)
    largest = float(bound.masked_fill(~there, 0).abs().max())
    slack = _SLACK * torch.finfo(bound.dtype).eps * (1 + largest)
    scores, places = bound.new_empty(0), search.first.new_empty(0)
    size = vocabulary.rows_that_fit(max(16, min(64, k)))
    step = size * -(-k // size)
    while len(scores) < count:
        # Not all of them in order at once: a few suffice, and places take twice a bound's bytes.
        values, order = bound.topk(min(step, count - len(scores)))
        bound[order] = -torch.inf
        for part in blocks(len(order), size):
            if len(scores) >= k and scores.topk(k).values[-1] >= values[part.start] + slack:
                return search.best(scores, places, k)
            some = order[part]
            scores = torch.cat([scores, search.scored(some)])
            places = torch.cat([places, some])
        step *= 2
    return search.best(scores, places, k)


class _Search:
    """The components of one sentence, those of all splits side by side.

    Attributes:
        first: The place of the first component of each split.
        before: The distributions at the states.
    """

    def __init__(
        self, vocabulary: Vocabulary, states: Tensor, splits: list[Split], row: int
    ) -> None:
        self.vocabulary, self.states, self.splits, self.row = vocabulary, states, splits, row
        counts = [0, *(split.grid.count for split in splits)]
        self.first = torch.tensor(counts, device=states.device).cumsum(0)
        self.steps = torch.tensor([split.step for split in splits], device=states.device)
        self.before = Distributions(vocabulary, states, row)

    def bounds(self) -> Float[Tensor, " component"]:
        """Returns what each gains at most; -inf of those that are not there."""
        used, at = self.steps.unique(return_inverse=True)
        found = []
        for some in used.split(self.vocabulary.rows_that_fit(len(used))):
            before, rows = self.before.at(some)
            found.append(self.vocabulary.slopes(before[rows], self.row))
        slopes = torch.cat(found)
        each = zip(self.splits, at.tolist(), strict=True)
        return torch.cat([split.bounds(slopes[place], self.row) for split, place in each])

    def _split_of(self, places: Tensor) -> Tensor:
        return torch.searchsorted(self.first, places, right=True) - 1

    def scored(self, places: Int[Tensor, " some"]) -> Float[Tensor, " some"]:
        """Returns the exact scores of some components."""
        vectors = self.states.new_empty(len(places), self.states.shape[1])
        split_of, rows = self._split_of(places), slice(self.row, self.row + 1)
        # Sorted out on the host: a mask on a GPU is waited for.
        owners = split_of.tolist()
        for index in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == index]
            mine = beside(places, mine)
            inside = (places[mine] - self.first[index])[None]
            vectors[mine] = self.splits[index].written(inside, rows)[0]
        before, at = self.before.at(self.steps[split_of])
        found = self.vocabulary.gains_from(before, at, vectors, self.row)
        # Exactly: rounding would put what is silent in some order.
        return found.masked_fill(~vectors.any(dim=1), 0)

    def best(self, scores: Tensor, places: Tensor, k: int) -> TopComponents:
        """Returns the best of those that were evaluated, equal scores in order of their places."""
        in_order = places.argsort()
        best = scores[in_order].sort(descending=True, stable=True)
        found = places[in_order][best.indices[:k]]
        split = self._split_of(found)
        place = found - self.first[split]
        return TopComponents(split, place, best.values[:k], len(scores), self.before.of_target())


def progress(splits: list[Split], what: str) -> Iterator[Split]:
    """Yields splits, with a progress bar on a terminal once two seconds have passed."""
    yield from tqdm(splits, desc=what, unit="sublayer", delay=2, leave=False, disable=None)
