"""The exact attribution graph: which token went through which head and memory to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import AnswerInputs, apart
from tl_contextmix.core.blocks import IDENTITIES
from tl_contextmix.core.frozen_blocks import freeze_stack
from tl_contextmix.core.linear_graph import (
    FeedForwards,
    Graph,
    Heads,
    LinearGraph,
    LinearStack,
    Node,
    Place,
)
from tl_contextmix.core.validation import Positive, Rule
from tl_contextmix.engine.log_prob_scores import AskedPass, Prediction, run_question
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import UnsupportedModel, bad, four_parts
from tl_contextmix.results import AttributionGraph, GraphNode
from tl_contextmix.results.labels import asked_words

Share = Annotated[float, Rule(lambda number: 0 < number <= 1, "a number above 0, at most 1")]
_PROMOTED = 5


@method(cites=("ameisen2025circuit",), estimated=False)  # nodes are chosen by their numbers
def flow(
    model: object,
    input: Input,
    *,
    neurons: bool = False,
    dictionary: Dictionaries = None,
    share: Share = 0.9,
    k: Positive = 200,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> AttributionGraph:
    r"""Returns the graph of what runs from tokens through heads and memories to an answer.

    Attention patterns, the scales of norms and the secant slopes :math:`(g(z) - g(0)) / z` of
    activations are frozen at their real values. The score is then linear in everything that is
    written to the residual stream, and with :math:`w_m` what node :math:`m` writes,
    :math:`g_m` the score's gradient there and :math:`r_m` the part of it that runs through what
    :math:`m` reads,

    .. math:: S(m) = \langle g_m, w_m \rangle, \qquad E(n \to m) = \langle r_m, w_n \rangle, \qquad
              S(m) = \sum_n E(n \to m), \qquad S(n) = \sum_m E(n \to m)

    exactly: edges into a node, and those out of it, add up to its score, and embeddings and biases
    add up to the answer's. Attribution graphs (Ameisen et al. 2025) have these properties in a
    model whose feed-forward blocks were replaced by transcoders; here it is the model itself.
    Patterns are not explained: what decides where a head looks is no edge.

    Where a dictionary stands, its features are nodes, with what its activation lets pass frozen,
    and so is what they miss at each position (``error``), which reads nothing: embeddings, biases
    and errors add up to the answer's.

    Nodes are embeddings (with what the model adds to them), heads at each position, feed-forward
    blocks at each position or their neurons, and the biases of each layer. With a foil the score
    is :math:`\log p(w) - \log p(f)`, for single tokens the difference of their logits. Without one
    it is the linear part of :math:`\log p(w)`, the target's logit less the mean logit,
    :math:`l_w - \sum_u p_u l_u`; what is missing to :math:`\log p(w)` is the entropy, which is no
    sum over nodes. Of sets both sides are means, each token as likely as the model finds it.

    Nodes are kept by their absolute score until ``share`` of the answer's score runs through kept
    nodes and biases alone (their number is found by bisection), or ``k`` are kept. What is pruned
    is one node ``rest`` for each layer, so that sums hold for what is shown. No edge is dropped.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, or token ids [1, pos].
        neurons: Whether neurons are nodes rather than feed-forward blocks.
        dictionary: A `Dictionary`, or several: transcoders in the place of feed-forward blocks,
            SAEs in that of the residual stream.
        share: How much of the answer's score has to run through kept nodes alone.
        k: How many nodes are kept, at most.
        max_bytes: Workspace, besides the pass and one gradient for each sublayer.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask and the like, see `Inputs`.

    Returns:
        An `AttributionGraph`, scores and edges in nats.

    Raises:
        InvalidInput: If an argument does not fit the model, or more than one prediction is asked
            about.
        UnsupportedModel: If the model has no vocabulary readout, an activation has no slope, or
            effects do not add up, as where hooks of your own edit values.

    Cost: a forward pass, about 15 linearised ones (half of them backward) for the number of nodes,
    and for each kept node the gradient of what it reads: ``n d`` operations for each norm of the
    layers below and ``d`` for each kept node there; the scores of all neurons come with the first.
    """
    given, answer = apart(input, inputs)
    with torch.no_grad():
        asked = run_question(
            with_dictionaries(as_view(model), dictionary),
            given,
            answer,
            needs=IDENTITIES - {"pattern", "z"},
            both_stacks=True,
        )
        if len(asked.question.rows) != 1:
            raise bad(
                "a graph is about one prediction",
                f"{len(asked.question.rows)} predictions",
                "one text, one position and an answer of one token",
                "Call flow for each; pos= says which token of an answer.",
            )
        prediction = asked.prediction("frozen+beta", max_bytes)
        whole = _linear_graph(asked, prediction, neurons)
        pulled = whole.pull()
        best = whole.best(pulled, k)
        kept = best[: _enough(whole, best, share)]
        graph = whole.graph(pulled, kept, max_bytes)
        _require_conserved(prediction, whole, graph)
        return AttributionGraph(
            scores=graph.scores,
            edges=graph.edges,
            nodes=_named(prediction, whole, graph),
            score=whole.score,
            explained=whole.passed_on(kept),
            possible=sum(int((whole.scores(pulled, *at) != 0).sum()) for at in pulled.gradients),
            log_prob=float(prediction.log_prob[0]),
            pos=int(prediction.stream.rows[0]),
            target=prediction.target,
            foil=prediction.foil,
            tokens=prediction.tokens,
            encoder=prediction.encoder,
            provenance=asked.forward_pass.provenance(
                "flow", {"neurons": neurons, "share": share, "k": k, "pos": answer.pos}
            ),
        )


def _linear_graph(asked: AskedPass, prediction: Prediction, neurons: bool) -> LinearGraph:
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


def _enough(whole: LinearGraph, best: Sequence[Place], share: float) -> int:
    """Returns how many of the best nodes pass on as much of the score as is asked for."""
    low, high = 0, len(best)
    while low < high:
        middle = (low + high) // 2
        missing = abs(whole.passed_on(best[:middle]) - whole.score)
        if missing <= (1 - share) * abs(whole.score):
            high = middle
        else:
            low = middle + 1
    return high


def _require_conserved(prediction: Prediction, whole: LinearGraph, graph: Graph) -> None:
    """Raises UnsupportedModel unless what enters each node is its score."""
    tolerance = prediction.view.tolerance
    reads = torch.tensor([whole.reads(node) for node in graph.nodes])
    gap = (graph.edges.sum(dim=1) - graph.scores)[reads].abs().max()
    error = float(gap / graph.edges.abs().sum(dim=1).max().clamp(min=1e-30))
    if not error <= tolerance:
        raise UnsupportedModel(
            four_parts(
                f"effects in {prediction.view.name} do not add up",
                f"a relative error of {error:.2g}",
                f"at most {tolerance:.0e}",
                "Take off hooks of your own that edit values or norms.",
            )
        )


def _named(prediction: Prediction, whole: LinearGraph, graph: Graph) -> tuple[GraphNode, ...]:
    """Returns the nodes with their names, tokens and what they promote."""
    sides = [prediction.tokens, prediction.encoder or prediction.tokens]
    places = [node.place for node in graph.nodes if node.place is not None]
    own = [place for place in places if place.stack == 0 and place.step >= 0]
    promoted: dict[Place, tuple[str, ...]] = {}
    if own:
        _, ids, _, _ = prediction.vocabulary.extremes(whole.writes(own), 0, _PROMOTED)
        words = ([prediction.view.to_output(i) for i in row] for row in ids.tolist())
        promoted = {place: tuple(row) for place, row in zip(own, words, strict=True)}
    layers = whole.stacks[0].steps[-1].layer + 1

    def name(node: Node) -> GraphNode:
        if node.layer > layers:
            if node.kind == "bias":
                return GraphNode("readout bias", layers)
            pos = int(prediction.stream.rows[0])
            asked = asked_words(prediction.target, prediction.foil)
            return GraphNode("answer", layers, pos, token=asked)
        prefix = "encoder " if node.stack else ""
        if node.place is None:
            return GraphNode(prefix + node.kind, node.layer)
        place = node.place
        token = sides[node.stack].strings[0][place.pos]
        if place.step < 0:
            return GraphNode(f"{prefix}embed", -1, place.pos, token=token)
        step = whole.stacks[node.stack].steps[place.step]
        nodes = step.nodes
        head, neuron, pattern = -1, -1, ()
        if isinstance(nodes, Heads):
            head, pattern = place.column, tuple(nodes.pattern[place.column, place.pos].tolist())
        elif isinstance(nodes, FeedForwards) and nodes.split:
            neuron = place.column
        return GraphNode(
            kind=prefix + step.kind,
            layer=node.layer,
            pos=place.pos,
            head=head,
            neuron=neuron,
            token=token,
            promotes=promoted.get(place, ()),
            pattern=pattern,
        )

    return tuple(map(name, graph.nodes))
