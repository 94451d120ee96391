"""Ablating the nodes of an attribution graph in the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, TokenInputs, read_batch
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.adapters.questions import Question, ask_about
from tl_contextmix.core.linear_graph import LinearGraph, Place
from tl_contextmix.core.linear_steps import FeedForwards
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import NotNegative, Positive, checked, whole_number
from tl_contextmix.engine.edited_runs import Ablation, Replacement, run_bytes
from tl_contextmix.engine.linear_graphs import (
    NEEDS,
    linear_graph,
    places_of,
    require_linear,
    step_names,
)
from tl_contextmix.engine.log_prob_scores import run_predictions
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import AttributionGraph, FlowKnockout
from tl_contextmix.results.axes import largest
from tl_contextmix.results.components import COLUMNS, KINDS, Components

Nodes = Sequence[int]


@checked
@method(cites=("ameisen2025circuit",), on_text=False)
def flow_knockout(
    model: object,
    input: Input,
    *,
    graph: AttributionGraph,
    nodes: Nodes | None = None,
    k: Positive = 50,
    others: bool = False,
    replace_with: Replacement = "zero",
    controls: NotNegative = 10,
    seed: int = 0,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[TokenInputs],
) -> FlowKnockout:
    r"""Returns what the model says without the nodes of an attribution graph.

    `flow` holds attention patterns, norms and slopes where they are; here the model runs, and all
    of them follow. A node is ablated at its own position: a head's ``hook_z``, a feed-forward
    block's ``hook_post`` or one neuron of it, an embedding's ``hook_resid_pre`` of the first
    block. Each node is ablated alone, then the first 1, 2, 4, ... of them together, and as many
    random ones: for every node another draw from those nodes of its own sublayer (same kind, same
    layer, any position) that have an effect at all. A draw may hold nodes of the graph, as a
    random ranking would.

    `linear` is what the linearised model loses, :math:`S - S_{\text{without}}`: for one node
    exactly its score in the graph, for several less than the sum of their scores where they read
    each other. The gap to `together` is what freezing hides.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: The text the graph is of.
        graph: A result of `flow` or `information_flow_routes`.
        nodes: Numbers of the nodes that are ablated, in order; None: those with the largest
            absolute scores. Biases, what was pruned, states and the answer are none.
        k: How many nodes at most, where none are named.
        others: Whether in the curve all other nodes of the model are ablated, and these stay: how
            much of the answer is left of so few.
        replace_with: ``"zero"``, or the ``"mean"`` over the real tokens of the input.
        controls: How many random rankings.
        seed: Of the random rankings.
        max_bytes: Workspace: as many runs as fit are one batch.
        **inputs: Mask, padding and the like, see `TokenInputs`.

    Returns:
        `FlowKnockout`, in nats: how far the log-probability of the graph's target falls, or where
        it has a foil the difference from the foil's.

    Raises:
        InvalidInput: If the graph is of another input, or a node cannot be ablated.
        UnsupportedModel: As in `flow`.

    Cost: a forward pass for each node, and one for each step of the curve and for each control
    there, batched; two linearised passes for each step.
    """
    view = as_view(model)
    given = Given(input, **inputs)
    chosen = _chosen(graph, nodes, k)
    with torch.no_grad():
        question = ask_about(view, read_batch(view, given), graph)
        asked = run_predictions(question, given, "layer", needs=NEEDS, both_stacks=True)
        prediction = asked.prediction("frozen+beta", max_bytes)
        split = any(graph.nodes[place].neuron >= 0 for place in chosen)
        whole = linear_graph(asked, prediction, split)
        require_linear(view, whole)
        places = places_of(whole, [graph.nodes[place] for place in chosen])
        random = [*_rankings(whole, places, controls, seed)]
        counts = _counts(len(places))
        runs = _Runs(view, given, question, replace_with == "mean", max_bytes)
        alone = runs.drops(_components(whole, [[place] for place in places]))
        sets = [some[:count] for some in (places, *random) for count in counts]
        drops = runs.drops(_components(whole, sets), others).view(-1, len(counts))
        rests = (whole.passed_on(places[:count], without=not others) for count in counts)
        linear = [whole.score - rest for rest in rests]
    return FlowKnockout(
        scores=graph.scores[chosen],
        alone=alone,
        together=drops[0],
        linear=alone.new_tensor(linear),
        random=drops[1:].T.contiguous(),
        nodes=tuple(graph.nodes[place] for place in chosen),
        counts=counts,
        log_prob=float(prediction.log_prob[0]),
        target=prediction.target,
        foil=prediction.foil,
        others=others,
        provenance=asked.forward_pass.provenance(
            "flow_knockout", {"replace_with": replace_with, "controls": controls, "seed": seed}
        ),
    )


def _chosen(graph: AttributionGraph, nodes: Nodes | None, k: int) -> list[int]:
    """Returns the numbers of the nodes that are ablated, in order."""
    if any(node.kind.endswith("feature") for node in graph.nodes):
        raise InvalidInput(
            "features cannot be ablated in the model",
            "a graph with a dictionary",
            "a graph of the model's own nodes",
            "Ask flow without dictionary=.",
        )
    if nodes is None:
        order = largest(graph.scores.abs().cpu(), len(graph.nodes)).tolist()
        found = [place for place in order if graph.nodes[place].written][:k]
    else:
        written = [place for place, node in enumerate(graph.nodes) if node.written]
        found = [place for place in map(whole_number, nodes) if place in written]
        if len({*found}) < len(nodes):
            raise InvalidInput(
                "these nodes cannot be ablated",
                f"nodes={[*nodes]}",
                f"numbers of embeddings, heads, feed-forward blocks or neurons among {written}, "
                "each once",
                "Leave nodes= out for the largest ones.",
            )
    if not found:
        raise InvalidInput(
            "there is no node to ablate",
            f"a graph of {len(graph.nodes)} nodes",
            "embeddings, heads, feed-forward blocks or neurons among them",
            "Ask flow for a larger share.",
        )
    return [place for place in found if place is not None]


def _counts(most: int) -> tuple[int, ...]:
    """Returns how many nodes are ablated together: powers of two, and all."""
    return tuple(sorted({most, *(2**power for power in range(most.bit_length()))}))


def _rankings(
    whole: LinearGraph, places: Sequence[Place], count: int, seed: int
) -> Iterator[list[Place]]:
    """Yields random rankings of nodes of the same sublayers that have an effect."""
    generator, pulled, pools = torch.Generator().manual_seed(seed), whole.pull(), {}
    for index, step in dict.fromkeys((place.stack, place.step) for place in places):
        there = whole.scores(pulled, index, step).cpu() != 0
        for place in places:
            if place[:2] == (index, step):
                there[place.pos, place.column] = True
        pools[index, step] = there.nonzero()
    for _ in range(count):
        drawn = {
            key: iter(pool[torch.randperm(len(pool), generator=generator)].tolist())
            for key, pool in pools.items()
        }
        yield [Place(*place[:2], *next(drawn[place[:2]])) for place in places]


def _components(whole: LinearGraph, sets: Sequence[Sequence[Place]]) -> Components:
    """Returns sets of nodes as rows of components."""
    names = {at: name for name, at in step_names(whole).items()}
    columns = {
        name: torch.full((len(sets), max(map(len, sets))), -1) for name in ("kind", *COLUMNS)
    }
    columns["kind"][:] = 0
    for row, some in enumerate(sets):
        for column, place in enumerate(some):
            kind, layer = names[place[:2]]
            entry = {"kind": KINDS.index(kind), "layer": layer, "pos": place.pos}
            if kind.endswith("attn"):
                entry["head"] = place.column
            elif kind.endswith("mlp") and whole.split:
                entry |= _neuron(whole, place)
            for name, number in entry.items():
                columns[name][row, column] = number
    return Components(**columns)


def _neuron(whole: LinearGraph, place: Place) -> dict[str, int]:
    """Returns the number of a neuron, and of its expert where there are several."""
    nodes = whole.stacks[place.stack].steps[place.step].nodes
    assert isinstance(nodes, FeedForwards)
    for number, columns, _ in nodes.frozen.sublayer.groups():
        if columns.start <= place.column < columns.stop:
            expert = -1 if number is None else number
            return {"neuron": place.column - columns.start, "expert": expert}
    raise AssertionError


@dataclass(frozen=True)
class _Runs:
    """Runs of the model on copies of one text, each without a set of components."""

    view: ModelView
    given: Given
    question: Question
    mean: bool
    max_bytes: int

    def drops(self, sets: Components, others: bool = False) -> Tensor:
        """Returns how far the score falls without each set, or without all others."""
        forward_pass = run_pass(self.view, self.given, batch=self.question.batch)
        plain = Ablation(forward_pass, self.question, others=others)
        logits, filling = plain.before([sets] if self.mean else [])
        asked, found = self.question.contrast(logits), []
        # Hooks may count on the sentences that were given.
        at_once = 1 if self.view.hooked() else max(1, self.max_bytes // run_bytes(forward_pass))
        rows = torch.arange(len(sets.kind)).split(at_once)
        for some in tqdm(rows, desc="flow_knockout", delay=2, leave=False, disable=None):
            several = self.question.repeated(len(some))
            again = run_pass(self.view, self.given, batch=several.batch)
            part = Components(**{name: getattr(sets, name)[some] for name in vars(sets)})
            after = Ablation(again, several, others=others).run(part, filling)
            found.append(asked.score(logits) - asked.repeat(len(some)).score(after))
        return torch.cat(found)
