"""Which token went through which head and which memory to make an answer: a graph of effects."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from tl_contextmix.core.graph_pruning import influence
from tl_contextmix.core.validation import require_choice
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.display_text import visible
from tl_contextmix.plotting.panels import Dot, Graph, Panel, Place, Table
from tl_contextmix.results import storage
from tl_contextmix.results.axes import as_array, largest, require_place
from tl_contextmix.results.base import Result
from tl_contextmix.results.component_sets import SHOWN
from tl_contextmix.results.components import ERRORS, FEATURES, short_name
from tl_contextmix.results.labels import Provenance, Tokens, asked_words
from tl_contextmix.results.row_tables import frame_of
from tl_contextmix.results.score_contributions import ScoreContributions

if TYPE_CHECKING:
    import pandas

_SHOWN = 80
WRITTEN = (
    *("embed", "attn", "cross_attn", "mlp", "per_layer_embed"),
    *("encoder embed", "encoder attn", "encoder mlp"),
)
"""Kinds of nodes that the model writes to its stream at one position."""
STATES = ("resid_mid", "resid_mid_cross", "resid_mid_mlp", "resid_post")
"""Kinds of nodes of information flow routes that stand for the stream itself."""


_CAPTIONS = {
    "nats": "Size: total effect on the answer. Edges: what runs directly from one to the other; "
    "those into a node add up to its effect, and so do those out of it. Attention patterns, norms "
    "and activation slopes are frozen.",
    "importance": "Size: up to which threshold a node is on a route. Edges: the share of a state "
    "that came by them, where above the threshold.",
}


@storage.storable
@dataclass(frozen=True)
class GraphNode:
    """Something that writes to the residual stream, or what gathers several.

    Attributes:
        kind: ``"embed"``, ``"attn"``, ``"cross_attn"``, ``"mlp"``, ``"per_layer_embed"``,
            ``"bias"`` (of a layer), ``"rest"`` (of a layer: what was pruned), ``"readout bias"`` or
            ``"answer"``; of an encoder-decoder's encoder ``"encoder embed"`` and so on. Of a
            dictionary ``"mlp feature"``, ``"mlp error"``, ``"resid_pre feature"`` and so on, and
            ``"error rest"`` (of a layer: errors that were pruned). Of routes also states:
            ``"resid_mid"``, ``"resid_mid_cross"``, ``"resid_mid_mlp"``, ``"resid_post"``.
        layer: Its layer; -1 for embeddings, the number of layers for the readout and the answer.
        pos: Its position; -1 for what gathers several.
        head: Its head; -1 for no head.
        neuron: Its neuron, or feature; -1 for a feed-forward block as a whole, and for what is
            none.
        token: The token at its position; of the answer what was asked.
        promotes: Tokens with the largest logits under what it writes; empty in an encoder.
        pattern: What a head attends to, by source; empty for others.
        triggers: Contexts that excite a neuron or feature most, where they were mined.
        reasons: Why a head looks where it does, where that was asked (`with_scores`).
    """

    kind: str
    layer: int
    pos: int = -1
    head: int = -1
    neuron: int = -1
    token: str = ""
    promotes: tuple[str, ...] = ()
    pattern: tuple[float, ...] = ()
    triggers: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def is_source(self) -> bool:
        """Whether it reads nothing: the scores of such nodes add up to that of the answer."""
        kind = self.kind.removeprefix("encoder ")
        starts = kind.split()[-1] in ("embed", "bias", "error") or kind == "error rest"
        return starts or (kind == "rest" and self.layer < 0)

    @property
    def written(self) -> bool:
        """Whether the model writes it at one position, so that it can be ablated there."""
        return self.kind in WRITTEN

    @property
    def label(self) -> str:
        """A short name, such as ``L3H5``, ``L3 mlp``, ``L3N120`` or ``L3 rest``."""
        if self.layer < 0 or self.kind in ("readout bias", "answer"):
            return self.kind
        cut = {"head": self.head, "neuron": self.neuron}
        return short_name(self.kind, self.layer, **{n: i for n, i in cut.items() if i >= 0})


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph(Result):
    """Effects of nodes on an answer, and what runs directly from one node to another.

    Of `flow`, edges into a node add up to its score, and so do those out of it; embeddings and
    biases add up to the answer's. Nothing is missing: what was pruned is one node for each layer,
    whose score is what enters it from the nodes that are shown. Of `information_flow_routes`, see
    there.

    Attributes:
        scores: Total effect of each node on `score`; of routes, see `unit`.
        edges: Direct effects, from each source (a column) to each target (a row).
        nodes: The nodes, from the input to the answer, which is last.
        score: What is explained: the log-odds of target and foil, or the linear part of the
            log-probability, as the model gives it.
        explained: The part of it that runs through nodes that are shown alone, at frozen patterns,
            norms and slopes.
        possible: How many nodes there are that have an effect, biases apart.
        log_prob: The target's log-probability, less the foil's.
        pos: Position that predicts.
        target: The predicted token; alternatives side by side.
        foil: What it is contrasted with, or None.
        tokens: The tokens of the stack that writes the answer.
        encoder: The tokens of the encoder that it reads, or None.
        provenance: Where the numbers come from.
        unit: ``"nats"``; of information flow routes ``"importance"``: edges are shares of what they
            lead to, and scores say up to which threshold a node is on a route.
    """

    LABELS = {"target": "nodes", "source": "nodes", "node": "nodes"}
    CHOICES = {"unit": tuple(_CAPTIONS)}

    scores: Float[torch.Tensor, " node"]
    edges: Float[torch.Tensor, "target source"]
    nodes: tuple[GraphNode, ...]
    score: float
    explained: float
    possible: int
    log_prob: float
    pos: int
    target: Tokens
    foil: Tokens | None
    tokens: Tokens
    encoder: Tokens | None
    provenance: Provenance
    unit: str = "nats"

    def _require_whole(self) -> None:
        """Raises InvalidInput for a node at a position that there is not, too."""
        super()._require_whole()
        for node in self.nodes:
            side = self.encoder if node.kind.startswith("encoder") else None
            require_place("nodes", node.pos, (side or self.tokens).shape[1])

    def influence(self) -> Float[torch.Tensor, " node"]:
        """Returns circuit-tracer's influence of each node on the answer.

        Edges into a node are divided by the sum of their absolute values; influence is the sum over
        all paths from a node to the answer of the products of these shares, 0 of the answer itself.
        """
        return influence(self.edges)

    def __repr__(self) -> str:
        lines = [
            f"AttributionGraph of {self.asked()}: {len(self.nodes)} nodes of {self.possible}, "
            f"score {self.score:.3f}, {self.explained:.3f} of it through them alone"
        ]
        for place in self._largest(5):
            node = self.nodes[place]
            where = f"{node.token!r} ({node.pos})"
            lines.append(f"  {node.label} {where} {float(self.scores[place]):+.3f}")
        return "\n".join(lines)

    def asked(self) -> str:
        """Returns what the graph is about, such as ``' are' rather than ' is'``."""
        return asked_words(self.target, self.foil)

    def with_triggers(self, mined: Any, *, k: int = 3) -> AttributionGraph:
        """Returns the graph with the contexts that excite its neurons or features most.

        The page shows them in a node's detail. Documents with a trigger are run again.

        Args:
            mined: What `mine_triggers` found, with model and corpus; of the same dictionary where
                the graph has one. Neurons that were not mined, and those whose coefficient was
                never positive, have none.
            k: How many of each.

        Raises:
            InvalidInput: If they were mined from another model or dictionary, or model or corpus
                are not at hand.
        """
        options, run = self.provenance.options, mined.manifest["run"]
        own = self.provenance.fingerprint, options.get("dictionary", [])
        if own != (run["weights"], run.get("dictionaries", [])):
            raise InvalidInput(
                "these triggers are those of other neurons",
                f"triggers of {run['model']}, {run.get('dictionaries', [])}",
                f"of {self.provenance.model}, {own[1]}",
                "Mine the same model, with the same dictionary=.",
            )
        prefix = "encoder " if mined.stack == "encoder" and self.encoder is not None else ""
        found = {}
        for node in self.nodes:
            known = mined.manifest["neurons"].get(str(node.layer), ())
            if node.neuron in known and node.kind.startswith(prefix):
                examples = mined.examples(node.layer, node.neuron, k=k)
                found[node.layer, node.neuron] = tuple(one.context for one in examples.triggers)
        nodes = (
            replace(node, triggers=found.get((node.layer, node.neuron), ())) for node in self.nodes
        )
        return replace(self, nodes=tuple(nodes))

    def with_scores(self, *found: ScoreContributions, k: int = 3) -> AttributionGraph:
        """Returns the graph with what its heads look for, which the page shows in their detail.

        Args:
            *found: What `query_contributions` with ``edge=`` found: of the same text, each of a
                head and position that is a node here. A node may have several.
            k: How many pairs of components of each.

        Raises:
            InvalidInput: If one is of another model or text, or of no node of this graph.
        """
        reasons: dict[tuple[str, int, int, int], tuple[str, ...]] = {}
        nodes = {(node.kind, node.layer, node.head, node.pos) for node in self.nodes}
        for one in found:
            prefix = "encoder " if one.kind.startswith("encoder ") and self.encoder else ""
            side = self.encoder if prefix else self.tokens
            kind = one.kind if self.encoder else one.kind.removeprefix("encoder ")
            at = (kind, one.layer, one.head, one.target)
            same = one.provenance.fingerprint == self.provenance.fingerprint
            if not same or side is None or not one.tokens.ids.equal(side.ids) or at not in nodes:
                raise InvalidInput(
                    "this score is of no node of the graph",
                    f"{one.asked()} of {one.provenance.model}",
                    "a head at a position that is a node, in the same model and text",
                    "Take layer, head and pos of a node, and a source of its pattern.",
                )
            reasons[at] = (*reasons.get(at, ()), "; ".join(one.reasons(k)))
        return replace(
            self,
            nodes=tuple(
                replace(node, reasons=reasons.get((node.kind, node.layer, node.head, node.pos), ()))
                for node in self.nodes
            ),
        )

    def to_dataframe(self, rows: str = "nodes") -> pandas.DataFrame:
        """Returns a table.

        Args:
            rows: ``"nodes"``: a row for each node, its fields and score. ``"edges"``: a row for
                each edge that is not zero, largest first, with the labels of both ends.
        """
        import pandas

        require_choice("table", rows, ("nodes", "edges"))
        if rows == "nodes":
            frame = frame_of(GraphNode, self.nodes)
            frame.insert(0, "label", [node.label for node in self.nodes])
            frame["score"] = as_array(self.scores)
            return frame
        found = []
        for place in largest(self.edges.abs(), int((self.edges != 0).sum())).tolist():
            target, source = divmod(place, len(self.nodes))
            ends = self.nodes[source], self.nodes[target]
            labels = [text for end in ends for text in (end.label, end.pos)]
            found.append((source, target, *labels, float(self.edges[target, source])))
        names = ["source", "target", "source_label", "source_pos", "target_label", "target_pos"]
        return pandas.DataFrame(found, columns=[*names, "score"])

    def to_networkx(self) -> Any:
        """Returns a `networkx.DiGraph` of the nodes and the edges that are not zero.

        Nodes are numbered and have their fields, ``label`` and ``score``; edges have a ``weight``.
        Text has every character written out that would not be seen, as XML holds no others.
        ``networkx.write_graphml`` writes it for Gephi, yEd or Cytoscape.
        """
        import networkx

        graph = networkx.DiGraph(asked=self.asked(), score=self.score, model=self.provenance.model)
        for place, node in enumerate(self.nodes):
            texts = {"token": node.token, "promotes": " ".join(node.promotes)}
            attributes = asdict(node) | {name: visible(text) for name, text in texts.items()}
            for name in ("pattern", "triggers", "reasons"):
                del attributes[name]
            graph.add_node(place, label=node.label, score=float(self.scores[place]), **attributes)
        for target, source in (self.edges != 0).nonzero().tolist():
            graph.add_edge(source, target, weight=float(self.edges[target, source]))
        return graph

    def to_circuit_tracer(self, slug: str = "flow") -> dict[str, Any]:
        """Returns the graph as circuit-tracer's graph files and Neuronpedia's viewer have it.

        Write it with ``json.dump``. Neurons and the features of transcoders are features there
        (number ``(l + f)(l + f + 1) / 2 + f``), errors, tokens and the answer what they are; heads,
        feed-forward blocks, biases, what was pruned and features of the stream have types of their
        own, which viewers show by their label. ``influence`` is the share of all absolute effects
        that nodes of at least this size have, for the viewer's slider. With a foil the answer's
        probability is that of the target among the two.

        Args:
            slug: A name for the graph.

        Raises:
            InvalidInput: If the model has two stacks: the format has one row of tokens.
        """
        if self.encoder is not None:
            raise InvalidInput(
                "the graph cannot be written in circuit-tracer's format",
                "a graph of an encoder and a decoder",
                "one stack",
                "Use to_networkx(), which keeps both.",
            )
        words = list(self.tokens.strings[0])
        order = self.scores.abs().cpu().argsort(descending=True, stable=True)
        size = self.scores.abs().cpu()[order]
        influence = torch.empty_like(size).scatter(0, order, (size / size.sum()).cumsum(0)).tolist()
        nodes = [self._circuit_tracer_node(node) for node in self.nodes]
        for one, node, score, share in zip(
            nodes, self.nodes, self.scores.tolist(), influence, strict=True
        ):
            label = f"{node.label}: {', '.join(node.promotes)}" if node.promotes else node.label
            one |= {"activation": score, "influence": share, "clerp": one.get("clerp", label)}
        ids = [one["node_id"] for one in nodes]
        links = [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for target, source in (self.edges != 0).nonzero().tolist()
            for weight in [float(self.edges[target, source])]
        ]
        return {
            "metadata": {
                "slug": slug,
                "scan": self.provenance.model,
                "transcoder_list": [],
                "prompt_tokens": words,
                "prompt": "".join(words),
                "node_threshold": 1.0,
                "schema_version": 1,
                "info": {
                    "generator": {"name": "tl_contextmix", "version": self.provenance.version}
                },
            },
            "qParams": {
                "pinnedIds": [],
                "supernodes": [],
                "linkType": "both",
                "clickedId": "",
                "sg_pos": "",
            },
            "nodes": nodes,
            "links": links,
        }

    def _circuit_tracer_node(self, node: GraphNode) -> dict[str, Any]:
        """Returns a node as circuit-tracer names it."""
        pos, layer = (node.pos if node.pos >= 0 else self.pos), str(node.layer)
        last = len(self.nodes) - 1
        if node is self.nodes[last]:
            token, layer = int(self.target.ids[0, 0]), str(node.layer + 1)
            odds = self.log_prob if self.foil is None else -math.log1p(math.exp(-self.log_prob))
            own = {
                "feature": token,
                "feature_type": "logit",
                "jsNodeId": f"L_{token}-{pos}",
                "is_target_logit": True,
                "token_prob": math.exp(odds),
                # Viewers read the number behind "p=".
                "clerp": f"Output {node.token} (p={math.exp(odds):.3f})",
            }
        elif node.kind == "embed":
            token, layer = int(self.tokens.ids[0, pos]), "E"
            own = {"feature": pos, "feature_type": "embedding", "jsNodeId": f"E_{token}-{pos}"}
        else:
            # Features are numbered from 0: what has no such number there counts down from -1.
            kinds = {"mlp": "feed-forward block", "attn": "attention head", "rest": "pruned"}
            kinds |= {"error rest": "pruned errors", "mlp error": "mlp reconstruction error"}
            apart = ("bias", "rest", "readout bias", "error rest", *ERRORS, *FEATURES[1:], *STATES)
            token = -2 - node.head
            if node.kind in apart:
                token = -1_000_000 * (1 + apart.index(node.kind)) - max(node.neuron, 0)
            number, kind = token, kinds.get(node.kind, node.kind)
            layer = "E" if node.layer < 0 else layer
            if node.kind in ("mlp", "mlp feature") and node.neuron >= 0:
                token, kind = node.neuron, "cross layer transcoder"
                number = (node.layer + token) * (node.layer + token + 1) // 2 + token
            own = {"feature": number, "feature_type": kind, "jsNodeId": f"{layer}_{token}-{pos}"}
        return {"node_id": f"{layer}_{token}_{pos}", "layer": layer, "ctx_idx": pos, **own}

    def panels(self) -> tuple[Panel, ...]:
        """Returns the graph, and its nodes by size."""
        title = f"What made {self.asked()}"
        columns = {where: i for i, where in enumerate(sorted({_column(n) for n in self.nodes}))}
        rows = {row: place for place, row in enumerate(dict.fromkeys(map(_row, self.nodes)))}
        dots = tuple(
            Dot(
                label=node.label,
                column=columns[_column(node)],
                row=rows[_row(node)],
                value=float(score),
                facts=self._facts(node),
            )
            for node, score in zip(self.nodes, self.scores, strict=True)
        )
        table = []
        for place in self._largest(SHOWN):
            node = self.nodes[place]
            promoted = ", ".join(map(repr, node.promotes)) or None
            at = Place(node.token, node.pos)
            table.append((node.label, at, float(self.scores[place]), promoted))
        return (
            Graph(
                title=title,
                caption=_CAPTIONS[self.unit],
                columns=tuple(map(self._place, columns)),
                rows=tuple(rows),
                nodes=dots,
                edges=self.edges,
                unit=self.unit,
                axes=("layer", "token"),
            ),
            Table(
                title=f"{title}: largest effects",
                caption="Those of nodes that read each other overlap.",
                columns=("node", "token", "effect", "promotes"),
                rows=tuple(table),
                signed=("effect",),
            ),
        )

    def _facts(self, node: GraphNode) -> tuple[tuple[str, str], ...]:
        """Returns what is told of a node besides its score."""
        found = [("promotes", ", ".join(map(repr, node.promotes)))] if node.promotes else []
        if node.pattern:
            side = self.encoder if node.kind in ("cross_attn", "encoder attn") else self.tokens
            words = (side or self.tokens).strings[0]
            best = largest(torch.tensor(node.pattern), 5).tolist()
            read = (f"{words[place]!r} ({place}) {node.pattern[place]:.2f}" for place in best)
            found.append(("attends to", ", ".join(read)))
        found += [("why", reason) for reason in node.reasons]
        if node.triggers:
            ends = (f"…{one[-_SHOWN:]}" if len(one) > _SHOWN else one for one in node.triggers)
            found.append(("triggered by", "; ".join(map(repr, ends))))
        return tuple(found)

    def _place(self, column: tuple[int, int]) -> Place | str:
        """Returns the label of a column."""
        side, pos = column
        tokens = (self.encoder, self.tokens, None)[side]
        return "all positions" if tokens is None else Place(tokens.strings[0][pos], pos)

    def _largest(self, k: int) -> list[int]:
        """Returns the nodes of largest effect, the answer and what gathers several apart."""
        gathered = ("answer", *STATES, *(f"encoder {state}" for state in STATES))
        single = torch.tensor([node.pos >= 0 and node.kind not in gathered for node in self.nodes])
        return largest(self.scores.abs().cpu().masked_fill(~single, torch.nan), k).tolist()


def _column(node: GraphNode) -> tuple[int, int]:
    """Returns the side of a node (encoder, answer's, neither) and its position, in order."""
    return (2, 0) if node.pos < 0 else (0 if node.kind.startswith("encoder") else 1, node.pos)


def _row(node: GraphNode) -> str:
    """Returns the name of the row that a node stands in: what gathers a layer on its last one."""
    side = "encoder " if node.kind.startswith("encoder ") else ""
    kind = node.kind.removeprefix("encoder ")
    if kind in ("answer", "readout bias"):
        return "answer"
    if node.layer < 0:
        return f"{side}embed"
    return f"{side}L{node.layer} {'mlp' if kind in ('bias', 'rest', 'error rest') else kind}"
