"""A prediction, the stream it is read from, and the stream cut into components that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.decompose import require_budget
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.inputs import Given, Pass, run_pass
from tl_contextmix.inputs.targets import Ids, Names, predicting_rows, target_tokens
from tl_contextmix.model_view import ModelView
from tl_contextmix.results import Tokens
from tl_contextmix.results.components import Components, components
from tl_contextmix.stream import (
    AttentionWriter,
    FeedForwardWriter,
    Neurons,
    Stream,
    Writer,
    needed,
    write_stream,
)
from tl_contextmix.vocabulary import NormRule, Vocabulary, read_vocabulary

By = Literal["layer", "head", "position", "head_position", "ff_neuron", "attn_neuron"]
CUTS: tuple[By, ...] = ("layer", "head", "position", "head_position", "ff_neuron", "attn_neuron")
# A score that lies within a few roundings of a bound is not decided by it.
_SLACK = 64


@dataclass(frozen=True)
class Question:
    """Why does the model give this token, at this position?

    Attributes:
        view: The model.
        done: The pass.
        stream: The residual stream that the answer is read from.
        vocabulary: How it is read.
        target: The token asked about, in each sentence.
        log_prob: Its log-probability as the model itself gives it.
    """

    view: ModelView
    done: Pass
    stream: Stream
    vocabulary: Vocabulary
    target: Tokens
    log_prob: Float[Tensor, " batch"]

    @property
    def encoder(self) -> Tokens | None:
        """The tokens that cross-attention reads, or None."""
        return self.done.tokens.get("encoder") if self.stream.stack == "decoder" else None

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the states of the stream."""
        names = [w.kind if w.layer < 0 else f"L{w.layer} {w.kind}" for w in self.stream.writers]
        return ("nothing", *names)


def ask(
    view: ModelView,
    given: Given,
    *,
    target: Names | None,
    target_ids: Ids | None,
    pos: int | Tensor | None,
    norm: NormRule,
    max_bytes: int,
    both_stacks: bool = False,
) -> Question:
    """Runs the model once and returns what it was asked.

    ``pos`` may be a position for each sentence; ``both_stacks`` says whether the encoder's
    activations are needed, too, where there are two.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If it has no vocabulary readout, or its stream is no sum.
    """
    view.readout.require()
    stack = view.base_stack(None)
    read = view.stacks if both_stacks else {stack: view.stacks[stack]}
    names = [
        name
        for blocks in read.values()
        for block in blocks
        for name in (*block.points(), *needed(block))
    ]
    done = run_pass(view, given, also=lambda block: () if block.layer else names)
    rows = pos
    if not isinstance(rows, Tensor):
        rows = predicting_rows(view, done.trace.batch, stack, rows)
    elif rows.shape != done.target.ids.shape[:1]:
        raise _other_sentences(len(rows), len(done.target.ids))
    stream = write_stream(view, done.trace, stack, rows)
    logits = done.trace.logits
    if logits is None:
        logits = view.readout(stream.total)
    else:
        logits = logits[torch.arange(len(rows), device=logits.device), rows.to(logits.device)]
    logits = logits.to(view.device, view.dtype)
    tokens = target_tokens(view, target, target_ids, logits)
    ids = tokens.ids[:, 0].to(view.device)
    vocabulary = read_vocabulary(view.readout, norm, stream.total, ids, require_budget(max_bytes))
    log_prob = logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
    return Question(view, done, stream, vocabulary, tokens, log_prob)


@dataclass(frozen=True)
class Cut:
    """One writer cut into components.

    Attributes:
        step: Place of the writer in the stream.
        labels: The components.
        vectors: Returns what each writes [batch component d_model], computed when it is asked
            for; None where they are neurons.
        neurons: The neurons, source by source, or None.
        bias: Label and vector of what none of the writer's components writes, or None.
    """

    step: int
    labels: Components
    vectors: Callable[[], Tensor] | None
    neurons: Neurons | None
    bias: tuple[Components, Tensor] | None

    @property
    def coefficients(self) -> Float[Tensor, "batch component"]:
        """Activations of the neurons; NaN of other components."""
        if self.neurons is None:
            return torch.full(self.labels.kind.shape, torch.nan)
        return self.neurons.activations.flatten(1)


def cuts(stream: Stream, by: By) -> Iterator[Cut]:
    """Yields the writers of a stream that can be cut in a way, cut.

    Args:
        stream: The stream.
        by: ``"layer"`` (sublayers as they are), ``"head"``, ``"position"`` (what all heads read
            from a source), ``"head_position"``, ``"ff_neuron"`` or ``"attn_neuron"``.
    """
    for step, writer in enumerate(stream.writers):
        yield from _cut(writer, by, step, stream.rows)


def _cut(writer: Writer, by: By, step: int, rows: Tensor) -> Iterator[Cut]:
    """Yields a writer's components; its bias comes with the last of them."""
    batch = len(rows)

    def label(kind: str, **columns: Tensor) -> Components:
        return components(batch, rows, kind, writer.layer, **columns)

    if by == "layer":
        yield Cut(step, label(writer.kind), lambda: writer.total[:, None], None, None)
    if by == "layer" or writer.kind == "embed":
        return
    bias = label(f"{writer.kind} bias"), writer.bias[:, None]
    if by == "ff_neuron" and isinstance(writer, FeedForwardWriter):
        index = torch.arange(writer.weight.shape[0])
        yield Cut(step, label(writer.kind, neuron=index), None, writer.neurons(), bias)
    if by == "ff_neuron" or not isinstance(writer, AttentionWriter):
        return
    heads, d_head, _ = writer.weight.shape
    head, source = torch.arange(heads), torch.arange(writer.pattern.shape[2])
    if by == "head":
        yield Cut(step, label(writer.kind, head=head), writer.heads, None, bias)
    elif by == "position":
        yield Cut(step, label(writer.kind, source=source), writer.sources, None, bias)
    elif by == "attn_neuron":
        first, second, third = torch.cartesian_prod(source, head, torch.arange(d_head)).T
        labels = label(writer.kind, source=first, head=second, neuron=third)
        yield Cut(step, labels, None, writer.neurons(), bias)
    else:
        # One head at a time: all of them take [head, source, d_model].
        for one in range(heads):
            labels = label(writer.kind, head=torch.full_like(source, one), source=source)
            last = bias if one == heads - 1 else None
            yield Cut(step, labels, partial(writer.head_sources, one), None, last)


def gains(question: Question, cut: Cut) -> Float[Tensor, "batch component"]:
    """Returns the increase of the log-probability by every component of a cut."""
    base = question.stream.states[:, cut.step]
    if cut.neurons is None:
        assert cut.vectors is not None
        return question.vocabulary.gains(base, cut.vectors())
    neurons = cut.neurons
    found = question.vocabulary.neuron_gains(base, neurons.vectors, neurons.coefficients)
    return found.flatten(1)


@dataclass(frozen=True)
class Best:
    """The neurons with the largest scores of one sentence.

    Attributes:
        cut: Which cut each belongs to.
        place: Its place there.
        score: Its score, largest first.
        evaluated: How many scores were computed to be sure.
    """

    cut: Int[Tensor, " some"]
    place: Int[Tensor, " some"]
    score: Float[Tensor, " some"]
    evaluated: int


def best_neurons(
    vocabulary: Vocabulary,
    states: Float[Tensor, "step d_model"],
    listed: list[Cut],
    k: int,
    row: int,
) -> Best:
    r"""Returns the neurons that gain most, without computing what all of them gain.

    Neurons are visited in the order of Jensen's bound ``coefficient * vector @ slope`` and scored
    in blocks until no bound that is left reaches the k-th score (see `vocabulary`). Linear
    readouts only. Cost: ``2 m d`` operations per sublayer for the bounds and ``2 d d_vocab`` per
    neuron evaluated.

    Args:
        vocabulary: How the stream is read.
        states: The states of the stream, in one sentence.
        listed: Cuts into neurons.
        k: How many.
        row: The sentence.
    """
    bounds, places, which = [], [], []
    for index, cut in enumerate(listed):
        assert cut.neurons is not None
        slope = vocabulary.slopes(vocabulary.log_probs(states[cut.step, None], row), row)[0]
        along = cut.neurons.vectors(slice(None)) @ slope
        bound = (cut.neurons.coefficients[row] * along).flatten()
        bounds.append(bound)
        places.append(torch.arange(len(bound), device=bound.device))
        which.append(torch.full_like(places[-1], index))
    bound, order = torch.cat(bounds).sort(descending=True)
    cut_of, place = torch.cat(which)[order], torch.cat(places)[order]
    slack = _SLACK * torch.finfo(bound.dtype).eps * (1 + float(bound.abs().max()))
    scores = bound.new_empty(0)
    size = vocabulary.rows_that_fit(max(16, min(64, k)))
    while len(scores) < len(bound):
        done = len(scores)
        if done >= k and scores.topk(k).values[-1] >= bound[done] + slack:
            break
        part = slice(done, done + size)
        found = _scored(vocabulary, states, listed, cut_of[part], place[part], row)
        scores = torch.cat([scores, found])
    best = scores.sort(descending=True, stable=True)
    keep = best.indices[:k]
    return Best(cut_of[keep], place[keep], best.values[:k], len(scores))


def _scored(
    vocabulary: Vocabulary,
    states: Tensor,
    listed: list[Cut],
    cut_of: Tensor,
    place: Tensor,
    row: int,
) -> Tensor:
    """Returns the exact scores of some neurons of one sentence."""
    vectors, before = [], []
    for index in cut_of.unique().tolist():
        cut = listed[index]
        assert cut.neurons is not None
        inside = place[cut_of == index]
        count = cut.neurons.rows.shape[0]
        number = cut.neurons.coefficients[row].flatten()[inside]
        vectors.append(number[:, None] * cut.neurons.vectors(inside % count))
        log_probs = vocabulary.log_probs(states[cut.step, None], row)
        before.append(log_probs.expand(len(inside), -1))
    found = vocabulary.gains_from(torch.cat(before), torch.cat(vectors), row)
    order = torch.cat([(cut_of == index).nonzero()[:, 0] for index in cut_of.unique().tolist()])
    return torch.empty_like(found).index_copy_(0, order, found)


def progress(listed: list[Cut], what: str) -> Iterator[Cut]:
    """Yields cuts, with a progress bar on a terminal once two seconds have passed."""
    yield from tqdm(listed, desc=what, unit="sublayer", delay=2, leave=False, disable=None)


def _other_sentences(seen: int, expected: int) -> InvalidInput:
    return InvalidInput(
        four_parts(
            "the components belong to other sentences",
            f"components of {seen} sentences",
            f"{expected}, as many as the input has",
            "Give the input that they were found on.",
        )
    )


def require_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises InvalidInput unless an option is one of those there are."""
    if value not in known:
        raise InvalidInput(
            four_parts(
                f"there is no such {name}",
                repr(value),
                f"one of {list(known)}",
                "Choose one of these.",
            )
        )
