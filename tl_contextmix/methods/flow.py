"""The exact attribution graph: which token went through which head and memory to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.dictionaries import Dictionaries
from tl_contextmix.adapters.dictionary_views import with_dictionaries
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import AnswerInputs, split_answer
from tl_contextmix.core.graph_pruning import kept_by_influence
from tl_contextmix.core.linear_graph import Graph, LinearGraph, Node, Place, Pulled
from tl_contextmix.core.linear_steps import FeedForwards, Heads
from tl_contextmix.core.token_sums import listed
from tl_contextmix.core.validation import Positive, Rule
from tl_contextmix.engine.linear_graphs import linear_graph, require_sums, run_single
from tl_contextmix.engine.log_prob_scores import Prediction
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
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
    prune: Literal["effect", "influence"] = "effect",
    share: Share = 0.9,
    edge_share: Share = 0.98,
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

    ``prune="influence"`` keeps nodes as circuit-tracer does: of the graph of the ``k`` largest and
    all embeddings those that have ``share`` of all influence (`AttributionGraph.influence`; its
    default is 0.8), and of these the ones on a way over edges that have ``edge_share`` of what is
    left. Embeddings stay. All edges between kept nodes are shown, here too.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, or token ids [1, pos].
        neurons: Whether neurons are nodes rather than feed-forward blocks.
        dictionary: A `Dictionary`, or several: transcoders in the place of feed-forward blocks,
            SAEs in that of the residual stream.
        prune: What decides which nodes are kept.
        share: How much of the answer's score has to run through kept nodes alone; by influence, how
            much of it kept nodes have.
        edge_share: By influence, how much of it the edges have that count.
        k: How many nodes are kept, at most; by influence, from how many.
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
    given, answer = split_answer(input, inputs)
    with torch.no_grad():
        view = with_dictionaries(as_view(model), dictionary)
        asked = run_single(view, given, answer)
        prediction = asked.prediction("frozen+beta", max_bytes)
        whole = linear_graph(asked, prediction, neurons)
        pulled = whole.pull()
        best = whole.best(pulled, k)
        if prune == "influence":
            kept = _influential(whole, pulled, best, share, edge_share, max_bytes)
        else:
            kept = best[: _enough(whole, best, share)]
        graph = whole.graph(pulled, kept, max_bytes)
        _require_conserved(prediction, whole, graph)
        return AttributionGraph(
            scores=graph.scores,
            edges=graph.edges,
            nodes=_named(prediction, whole, graph),
            score=whole.score,
            explained=whole.passed_on(kept),
            possible=whole.possible(pulled),
            log_prob=float(prediction.log_prob[0]),
            pos=int(prediction.stream.rows[0]),
            target=prediction.target,
            foil=prediction.foil,
            tokens=prediction.tokens,
            encoder=prediction.encoder,
            provenance=asked.forward_pass.provenance(
                "flow",
                {
                    "neurons": neurons,
                    "prune": prune,
                    "share": share,
                    "edge_share": edge_share,
                    "k": k,
                    "pos": answer.pos,
                },
            ),
        )


def _enough(whole: LinearGraph, best: Sequence[Place], share: float) -> int:
    """Returns how many of the best nodes pass on as much of the score as is asked for."""
    low, high = 0, len(best)
    while low < high:
        middle = (low + high) // 2
        missing = abs(whole.passed_on(best[:middle]) - whole.score)
        # On shapes alone, where nothing has a score, all are kept.
        if missing <= (1 - share) * abs(whole.score) and not whole.slope.is_meta:
            high = middle
        else:
            low = middle + 1
    return high


def _influential(
    whole: LinearGraph,
    pulled: Pulled,
    best: Sequence[Place],
    share: float,
    edge_share: float,
    max_bytes: int,
) -> list[Place]:
    """Returns the nodes that circuit-tracer's rule keeps, embeddings first."""
    entering = [
        Place(index, -1, pos, 0)
        for index in range(len(whole.stacks))
        for pos in whole.scores(pulled, index, -1).nonzero()[:, 0].tolist()
    ]
    graph = whole.graph(pulled, [*dict.fromkeys([*entering, *best])], max_bytes)
    always = torch.tensor([node.place in entering for node in graph.nodes])
    kept = kept_by_influence(graph.edges, always.to(graph.edges.device), share, edge_share)
    pairs = zip(graph.nodes, kept.tolist(), strict=True)
    return [node.place for node, stays in pairs if stays and node.place is not None]


def _require_conserved(prediction: Prediction, whole: LinearGraph, graph: Graph) -> None:
    """Raises UnsupportedModel unless what enters each node is its score."""
    reads = torch.tensor([whole.reads(node) for node in graph.nodes])
    gap = (graph.edges.sum(dim=1) - graph.scores)[reads].abs().max()
    error = float(gap / graph.edges.abs().sum(dim=1).max().clamp(min=1e-30))
    require_sums(prediction.view, error)


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
    patterns: dict[Place, Tensor] = {}
    for place in places:
        nodes = None if place.step < 0 else whole.stacks[place.stack].steps[place.step].nodes
        if isinstance(nodes, Heads):
            patterns[place] = nodes.frozen.pattern[0, place.column, place.pos]
    read = dict(zip(patterns, listed([*patterns.values()]), strict=True))

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
            head, pattern = place.column, tuple(read[place])
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
