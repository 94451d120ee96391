"""Information flow routes (Ferrando & Voita 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.questions import AnswerInputs, split_answer
from tl_contextmix.core.blocks import Trace
from tl_contextmix.core.flow_routes import RouteNode, find_routes
from tl_contextmix.core.token_sums import listed
from tl_contextmix.core.validation import Positive, Rule
from tl_contextmix.engine.linear_graphs import linear_graph, places_of, require_linear, run_single
from tl_contextmix.engine.log_prob_scores import Prediction
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.results import AttributionGraph, GraphNode
from tl_contextmix.results.labels import asked_words

Threshold = Annotated[float, Rule(lambda number: 0 <= number < 1, "a number from 0, below 1")]


@method(cites=("ferrando2024information",), estimated=False)  # what is followed is not known before
def information_flow_routes(
    model: object,
    input: Input,
    *,
    threshold: Threshold = 0.04,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> AttributionGraph:
    r"""Returns the routes by which information flows to the position that predicts.

    A state :math:`y = \sum_j z_j` of the residual stream is a sum of the state before, of what each
    head read from each source, and of what the feed-forward block added. The importance of each is

    .. math:: e_j = \frac{\max(0, ||y||_1 - ||z_j - y||_1)}{\sum_k \max(0, ||y||_1 - ||z_k - y||_1)}

    (Ferrando & Voita 2024). From the last state at the position downwards, what is more important
    than the threshold is followed. Nothing here knows which token is predicted: `flow` does.
    `flow_knockout` tests both.

    As in the authors' code a feed-forward block has its bias, attention's output bias is in
    :math:`y` and in no part, and what is followed is not renormalised. A parallel block has one
    state, post-LN norms have frozen scales, and cross-attention is followed into the encoder.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, or token ids [1, pos].
        threshold: Importance above which an edge is followed.
        max_bytes: Workspace: what one head reads at one position is held at least.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask and the like, see `Inputs`.

    Returns:
        An `AttributionGraph` whose edges are importances and whose scores say up to which
        threshold a node is on a route (1 for the answer). `explained` is what runs through its
        embeddings, heads and feed-forward blocks and all biases in the linearised model of `flow`.

    Raises:
        InvalidInput: If an argument does not fit the model, or more than one prediction is asked
            about.
        UnsupportedModel: As in `flow`.

    Cost: a forward pass, two linearised ones, and ``5 n d`` operations for each head of each state
    that is reached; on a GPU of every state, which is then waited for once and not in every layer.
    """
    given, answer = split_answer(input, inputs)
    with torch.no_grad():
        asked = run_single(as_view(model), given, answer)
        prediction = asked.prediction("frozen+beta", max_bytes)
        view, trace = prediction.view, asked.forward_pass.trace
        whole = linear_graph(asked, prediction, False)
        pulled = require_linear(view, whole)
        pos = int(prediction.stream.rows[0])
        stacks = [view.stacks[stack.name] for stack in whole.stacks]
        routes = find_routes(stacks, trace, pos, threshold, max_bytes)
        found = sorted(routes.nodes, key=_order)
        number = {node: place for place, node in enumerate(found)}
        edges = torch.zeros(len(found), len(found), dtype=whole.slope.dtype)
        for (target, source), share in routes.edges.items():
            edges[number[target], number[source]] = share
        edges = edges.to(whole.slope.device)
        nodes = _named(prediction, trace, found)
        written = places_of(whole, [node for node in nodes if node.written])
        return AttributionGraph(
            scores=edges.new_tensor([routes.nodes[node] for node in found]),
            edges=edges,
            nodes=nodes,
            score=whole.score,
            explained=whole.passed_on(written),
            possible=whole.possible(pulled),
            log_prob=float(prediction.log_prob[0]),
            pos=pos,
            target=prediction.target,
            foil=prediction.foil,
            tokens=prediction.tokens,
            encoder=prediction.encoder,
            provenance=asked.forward_pass.provenance(
                "information_flow_routes", {"threshold": threshold, "pos": answer.pos}
            ),
            unit="importance",
        )


_KINDS = (
    *("embed", "attn", "resid_mid", "cross_attn", "resid_mid_cross"),
    *("mlp", "resid_mid_mlp", "per_layer_embed", "resid_post"),
)


def _order(node: RouteNode) -> tuple[int, ...]:
    """Returns what puts nodes after those that they read."""
    kind = len(_KINDS) if node.kind == "answer" else _KINDS.index(node.kind)
    return -node.stack, node.layer, kind, node.pos, node.head


def _named(
    prediction: Prediction, trace: Trace, found: Sequence[RouteNode]
) -> tuple[GraphNode, ...]:
    """Returns nodes with their tokens, and heads with their patterns."""
    stacks = prediction.stream.stack, "encoder"
    patterns: dict[RouteNode, Tensor] = {}
    for node in found:
        if node.head >= 0:
            kind = "cross" if node.kind == "cross_attn" else "self"
            attention = prediction.view.stacks[stacks[node.stack]][node.layer].attention(kind)
            patterns[node] = trace.mixing(attention)[0, node.head, node.pos]
    read = dict(zip(patterns, listed([*patterns.values()]), strict=True))

    def name(node: RouteNode) -> GraphNode:
        if node.kind == "answer":
            asked = asked_words(prediction.target, prediction.foil)
            return GraphNode("answer", node.layer + 1, node.pos, token=asked)
        side = prediction.encoder if node.stack else prediction.tokens
        assert side is not None
        return GraphNode(
            kind=f"encoder {node.kind}" if node.stack else node.kind,
            layer=node.layer,
            pos=node.pos,
            head=node.head,
            token=side.strings[0][node.pos],
            pattern=tuple(read.get(node, ())),
        )

    return tuple(map(name, found))
