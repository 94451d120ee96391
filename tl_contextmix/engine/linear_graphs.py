"""A prediction as a linear function of everything that was written to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.blocks import IDENTITIES
from tl_contextmix.core.frozen_blocks import freeze_stack
from tl_contextmix.core.linear_graph import LinearGraph, Place, Pulled
from tl_contextmix.core.linear_steps import LinearStack
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.log_prob_scores import AskedPass, Prediction, run_question
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results import GraphNode

NEEDS = IDENTITIES - {"pattern", "z"}
"""What has to hold of a pass that hooks edited."""


def linear_graph(asked: AskedPass, prediction: Prediction, neurons: bool) -> LinearGraph:
    """Returns the score as a function of all that is written, frozen at the pass."""
    view, trace = prediction.view, asked.forward_pass.trace
    stream, encoder, frozen = prediction.stream, view.stacks.get("encoder"), None
    if stream.stack == "decoder" and encoder is not None:
        norm = view.final_norms.get("encoder")
        frozen = freeze_stack(encoder, trace, False, final_norm=norm)
    own = freeze_stack(view.stacks[stream.stack], trace, False, encoder=frozen)
    named = [(stream.stack, own)] + ([] if frozen is None else [("encoder", frozen)])
    stacks = tuple(LinearStack.of(name, stack, trace, neurons) for name, stack in named)
    slope, constant = prediction.vocabulary.linear_part(stream.total[0], 0)
    at_end = torch.zeros_like(stacks[0].start)
    at_end[int(stream.rows[0])] = slope
    return LinearGraph(stacks, at_end, constant, float(slope @ stream.total[0]) + constant)


def run_single(view: ModelView, given: Given, answer: Answer) -> AskedPass:
    """Runs the model on the one prediction that a graph is about.

    Raises:
        InvalidInput: If there are several.
    """
    asked = run_question(view, given, answer, needs=NEEDS, both_stacks=True)
    if len(asked.question.rows) != 1:
        raise InvalidInput(
            "a graph is about one prediction",
            f"{len(asked.question.rows)} predictions",
            "one text, one position and an answer of one token",
            "Ask about each alone; pos= says which token of an answer.",
        )
    return asked


def require_linear(view: ModelView, whole: LinearGraph) -> Pulled:
    """Returns the gradients of everything that is written.

    Raises:
        UnsupportedModel: Unless what enters the model and biases add up to the score.
    """
    pulled = whole.pull()
    parts = [whole.scores(pulled, index, -1).flatten() for index in range(len(whole.stacks))]
    parts += [bias.reshape(1) for bias in pulled.biases.values()]
    every = torch.cat([*parts, whole.slope.new_tensor([whole.constant])])
    require_sums(
        view, float((every.sum() - whole.score).abs() / every.abs().sum().clamp(min=1e-30))
    )
    return pulled


def require_sums(view: ModelView, error: float) -> None:
    """Raises UnsupportedModel where the relative error of sums is too large."""
    if not error <= view.tolerance:
        raise UnsupportedModel(
            f"effects in {view.name} do not add up",
            f"a relative error of {error:.2g}",
            f"at most {view.tolerance:.0e}",
            "Take off hooks of your own that edit values or norms.",
        )


def step_names(whole: LinearGraph) -> dict[tuple[str, int], tuple[int, int]]:
    """Returns stack and step of everything that is written, by its kind and layer."""
    result = {}
    for index, stack in enumerate(whole.stacks):
        prefix = "encoder " if index else ""
        result[f"{prefix}embed", -1] = index, -1
        for place, step in enumerate(stack.steps):
            result[f"{prefix}{step.kind}", step.layer] = index, place
    return result


def places_of(whole: LinearGraph, nodes: Sequence[GraphNode]) -> list[Place]:
    """Returns where nodes that are written are."""
    at = step_names(whole)
    return [Place(*at[n.kind, n.layer], n.pos, max(n.head, n.neuron, 0)) for n in nodes]
