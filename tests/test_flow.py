"""Attribution graphs: sums, edges against a literal forward pass with a gate on every edge."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy
import pytest
import torch
import zoo
from asked import bound, case_of, first_of, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.blocks import AttentionSublayer, FeedForward, Trace
from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.results import AttributionGraph, Result

pytestmark = pytest.mark.mostly_once

CASES = [case for case in zoo.cases() if case.family not in zoo.OPAQUE_FEED_FORWARD]
TEXT = "the keys to the cabinet"
ARE: Any = {"target": " are", "foil": " is"}


def one(given: zoo.Inputs) -> Any:
    """The first sentence of a zoo input, and a prediction."""
    return {"pos": -1, **first_of(given)}


def graph_of(case: zoo.Case, **options: Any) -> AttributionGraph:
    """The graph of a contrast of two tokens."""
    model, given = shared(case)
    asked: Any = {**one(given), "target": 3, "foil": 5, **options}
    return cm.flow(model, **asked)


def conserved(graph: AttributionGraph, limit: float) -> None:
    """Edges into a node and out of it, and what enters the graph, add up to the scores."""
    size = float(graph.scores.abs().max())
    source = torch.tensor([node.is_source for node in graph.nodes])
    into, out = graph.edges.sum(dim=1), graph.edges.sum(dim=0)
    assert float((into - graph.scores)[~source].abs().max()) < limit * size
    assert float((out - graph.scores)[:-1].abs().max()) < limit * size
    assert float(into[source].abs().max()) == 0
    assert float((graph.scores[source].sum() - graph.score).abs()) < limit * size
    assert float(graph.scores[-1]) == pytest.approx(graph.score, abs=limit * size)
    assert graph.nodes[-1].kind == "answer"


@pytest.mark.every
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_hold_in_every_model(case: zoo.Case):
    # Hosts that compute norms in float32 add up to their own numbers no better than that.
    limit = max(1e-9, 30 * bound(case)) if bound(case) > 1e-9 else 1e-9
    for neurons in (False, True):
        graph = graph_of(case, neurons=neurons, share=1.0, k=12)
        conserved(graph, limit)
        assert graph.score == pytest.approx(graph.log_prob, abs=1e-6)
        kinds = {node.kind for node in graph.nodes}
        assert any("rest" in kind for kind in kinds)
        single = [node for node in graph.nodes if node.pos >= 0]
        assert len(single) == 13
        assert any(node.neuron >= 0 for node in single) <= neurons


# ---- a literal forward pass


def frozen(norm: Norm | None, parts: Any, bias: Any) -> Any:
    """Parts after a norm whose scale is that of their sum, its bias being one of them."""
    if norm is None:
        return dict(parts)
    whole = torch.stack([*parts.values()]).sum(0).detach()
    centred = whole - whole.mean(-1, keepdim=True) if norm.kind == "ln" else whole
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    found = {}
    for name, part in parts.items():
        part = part - part.mean(-1, keepdim=True) if norm.kind == "ln" else part
        found[name] = part * (1 if norm.weight is None else norm.weight) / scale
    if norm.bias is not None:
        found[bias] = found.get(bias, 0) + norm.bias.expand_as(whole)
    return found


class Literal:
    """A frozen model, part by part, with a gate on every edge: all are 1."""

    def __init__(self, view: Any, trace: Trace) -> None:
        self.view, self.trace = view, trace
        self.gates: dict[Any, Tensor] = {}

    def _read(self, reader: Any, parts: Any) -> Any:
        found: Any = {}
        for name, part in parts.items():
            gate = self.gates.setdefault((reader, name), torch.ones((), dtype=part.dtype))
            found[name] = part * gate.requires_grad_()
        return found

    def _stack(self, name: str, memory: dict[Any, Tensor] | None) -> dict[Any, Tensor]:
        prefix = "encoder " if memory is None and len(self.view.stacks) == 2 else ""
        blocks = self.view.stacks[name]
        x = self.trace.resid_in(blocks[0])[0].detach()
        parts = {
            (f"{prefix}embed", -1, pos, -1): torch.zeros_like(x).index_put(
                (torch.tensor(pos),), x[pos]
            )
            for pos in range(len(x))
        }
        for block in blocks:
            before, bias = dict(parts), (f"{prefix}bias", block.layer, -1, -1)
            for attention in block.attentions:
                parts = self._attention(attention, block.layer, parts, memory, prefix, bias)
            read = before if block.parallel else parts
            parts = self._feed_forward(block.feed_forward, block.layer, parts, read, prefix, bias)
        return parts

    def _after(self, sub: Any, parts: Any, written: Any, constant: Any, bias: Any) -> Any:
        like = next(iter(parts.values()))
        if constant is not None:
            written = {**written, bias: constant.expand_as(like)}
        total = defaultdict(lambda: torch.zeros_like(like), parts)
        for name, part in frozen(sub.norm_out, written, bias).items():
            total[name] = total[name] + part
        return frozen(sub.norm_after, dict(total), bias)

    def _attention(
        self, sub: AttentionSublayer, layer: int, parts: Any, memory: Any, prefix: str, bias: Any
    ) -> Any:
        cross = sub.kind == "cross"
        pattern = self.trace[sub.pattern][0].detach()
        W_V, W_O, b_V = sub.weights("W_V"), sub.W_O, sub.weights("b_V")
        kind, written = f"{prefix}{'cross_attn' if cross else 'attn'}", {}
        source = memory if cross else parts
        for head in range(pattern.shape[0]):
            for pos in range(pattern.shape[1]):
                name = (kind, layer, pos, head)
                # Frozen at the whole, gated afterwards: gates do not move scales.
                seen = source if cross else frozen(sub.norm_in, source, bias)
                read = torch.stack([*self._read(name, seen).values()]).sum(0)
                value = read @ W_V[head]
                if b_V is not None:
                    gate = self.gates.setdefault((name, bias), torch.ones((), dtype=read.dtype))
                    value = value + gate.requires_grad_() * b_V[head]
                row = torch.zeros_like(next(iter(parts.values())))
                written[name] = row.index_put(
                    (torch.tensor(pos),), pattern[head, pos] @ value @ W_O[head]
                )
        return self._after(sub, parts, written, sub.b_O, bias)

    def _feed_forward(
        self, ff: FeedForward, layer: int, parts: Any, source: Any, prefix: str, bias: Any
    ) -> Any:
        seen, written = frozen(ff.norm_in, source, bias), {}
        whole = torch.stack([*seen.values()]).sum(0).detach()
        totals = [whole @ w + (0 if b is None else b) for w, b in ff.branches()]
        slopes, start = self._slopes(ff, totals)
        for pos in range(len(whole)):
            name = (f"{prefix}mlp", layer, pos, -1)
            read = torch.stack([*self._read(name, seen).values()]).sum(0)[pos]
            gate = self.gates.setdefault((name, bias), torch.ones((), dtype=read.dtype))
            post = gate.requires_grad_() * start
            for (w, b), slope in zip(ff.branches(), slopes, strict=True):
                post = post + slope[pos] * (read @ w + (0 if b is None else gate * b))
            written[name] = torch.zeros_like(whole).index_put((torch.tensor(pos),), post @ ff.W_out)
        return self._after(ff, parts, written, ff.constant(), bias)

    @staticmethod
    def _slopes(ff: FeedForward, totals: list[Tensor]) -> Any:
        act, zero = ff.require_activation(), torch.zeros_like(totals[0][0])
        if not ff.gated:
            return [(act(totals[0]) - act(zero)) / totals[0]], act(zero)
        nodes, weights = numpy.polynomial.legendre.leggauss(64)
        gate, linear = totals
        pairs = zip((nodes + 1) / 2, weights / 2, strict=True)
        mean = sum(float(w) * act(float(alpha) * gate) for alpha, w in pairs)
        return [linear * (act(gate) - mean) / gate, mean], zero

    def edges(self, row: int, columns: Tensor) -> dict[Any, float]:
        """Effects on the logits of the columns' difference, from source to target."""
        memory, stacks = None, self.view.stacks
        if len(stacks) == 2:
            memory = self._stack("encoder", None)
            last = ("encoder bias", len(stacks["encoder"]) - 1, -1, -1)
            memory = frozen(self.view.final_norms.get("encoder"), memory, last)
        name = "decoder" if "decoder" in stacks else "encoder"
        parts = self._stack(name, memory)
        bias = ("readout bias", len(stacks[name]), -1, -1)
        read = frozen(self.view.readout.norm, parts, bias)
        answer = ("answer", len(stacks[name]), row, -1)
        total = (
            torch.stack([*self._read(answer, read).values()]).sum(0)[row] * self.view.readout.scale
        )
        score = total @ columns
        grads = torch.autograd.grad(score, [*self.gates.values()], allow_unused=True)
        return {
            key: 0.0 if grad is None else float(grad)
            for key, grad in zip(self.gates, grads, strict=True)
        }


@pytest.mark.every
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "t5", "bart", "opt"])
def test_edges_are_those_of_a_literal_pass_with_gates(family: str):
    case = case_of(family)
    model, given = shared(case)
    short = {"input": given.tokens[:1, :3], "pos": -1}
    if case.encoder_decoder:
        short["decoder_input"] = given.decoder_tokens[:1, :2]
    graph = cm.flow(model, **short, target=3, foil=5, share=1.0, k=1000)
    view = view_of(model)
    made = view_batch(view, short)
    names = [
        name
        for _, block in view.every_block()
        for name in (block.resid_in, *(a.pattern for a in block.attentions))
    ]
    trace = view.run(made, names)
    columns = view.readout.weights("W_U")[:, [3, 5]] * torch.tensor([1.0, -1.0]).to(view.dtype)
    if view.readout.soft_cap is not None:
        cap = view.readout.soft_cap
        capped = trace.logits[0, graph.pos, [3, 5]].to(view.dtype) / cap
        columns = columns * capped / capped.atanh()
    expected = Literal(view, trace).edges(graph.pos, columns.sum(dim=1))
    limit = (1e-9 if bound(case) < 1e-9 else 1e-5) * max(map(abs, expected.values()))
    keys = [(n.kind, n.layer, n.pos, n.head) for n in graph.nodes]
    checked = 0
    for place in graph.edges.flatten().nonzero()[:, 0].tolist():
        target, source = divmod(place, len(keys))
        if keys[source][0] != "readout bias":
            literal = expected.pop((keys[target], keys[source]))
            assert float(graph.edges[target, source]) == pytest.approx(literal, abs=limit)
            checked += abs(literal) > 1e3 * limit
    assert checked > 20
    left = [abs(v) for (_, source), v in expected.items() if source[0] != "readout bias"]
    assert max(left, default=0.0) < limit


# ---- pruning, and what is frozen


def test_pruned_nodes_carry_exactly_their_score_in_the_linear_model():
    """Without a node, the linearised model's score is less by the node's: no more, no less."""
    model, given = shared(case_of("gptj", "gpt2"))
    whole = cm.flow(model, **one(given), target=3, foil=5, share=1.0, k=10_000)
    assert whole.explained == pytest.approx(whole.score, rel=1e-9)
    assert whole.possible == len([n for n in whole.nodes if n.pos >= 0 and n.kind != "answer"])
    # All but the smallest: what is missing is what runs through it.
    fewer = cm.flow(model, **one(given), target=3, foil=5, share=1.0, k=whole.possible - 1)
    left = {(n.label, n.pos) for n in whole.nodes} - {(n.label, n.pos) for n in fewer.nodes}
    ((label, pos),) = [key for key in left if key[1] >= 0]
    place = next(i for i, n in enumerate(whole.nodes) if (n.label, n.pos) == (label, pos))
    assert whole.score - fewer.explained == pytest.approx(float(whole.scores[place]), abs=1e-9)
    # The rest of its layer is it alone, with the same edges.
    rest = next(i for i, n in enumerate(fewer.nodes) if "rest" in n.kind)
    assert float(fewer.scores[rest]) == pytest.approx(float(whole.scores[place]), abs=1e-9)
    assert torch.allclose(fewer.edges[rest].sort().values, whole.edges[place].sort().values)


def test_nodes_are_kept_until_the_share_is_explained(causal):
    few, most = (cm.flow(causal, TEXT, **ARE, share=share) for share in (0.5, 0.95))
    for graph, share in ((few, 0.5), (most, 0.95)):
        conserved(graph, 1e-5)
        assert abs(graph.explained - graph.score) <= (1 - share) * abs(graph.score)
    assert len(few.nodes) < len(most.nodes)
    every = cm.log_prob_contributions(causal, TEXT, **ARE, by="head")
    head = most.nodes[most._largest(1)[0]]
    assert head.label == every.top(1).labels()[0] == "L3H0"
    # A head of the last layer is read by the answer and by the last feed-forward block.
    direct = float(most.edges[-1, most._largest(1)[0]])
    assert direct == pytest.approx(float(every.top(1).scores[0, 0]), abs=1e-5)


def test_workspace_changes_no_number(causal):
    wide, narrow = (cm.flow(causal, TEXT, **ARE, max_bytes=size) for size in (2**30, 1))
    assert wide.nodes == narrow.nodes
    assert torch.allclose(wide.edges, narrow.edges, atol=1e-6)


def test_a_kept_node_costs_less_than_a_backward_pass(causal):
    """Counted: one linearised pass down is the bound for each node."""
    few, more = (
        count_operations(lambda k=k: cm.flow(causal, TEXT, **ARE, share=1.0, k=k)) for k in (8, 72)
    )
    ids = causal.to_tokens(TEXT)
    weights = sum(p.numel() for name, p in causal.named_parameters() if "embed" not in name)
    backward = 2 * weights * ids.shape[1]
    assert 0 < more - few < 64 * backward


def test_neurons_take_the_place_of_their_block(causal):
    graph = cm.flow(causal, TEXT, **ARE, neurons=True, k=40)
    conserved(graph, 1e-5)
    some = [node for node in graph.nodes if node.neuron >= 0]
    assert some
    assert not [n for n in graph.nodes if n.kind == "mlp" and n.neuron < 0]
    assert all(len(node.promotes) == 5 for node in some)
    assert {node.label for node in some if node.layer == 3} <= {
        f"L3N{i}" for i in range(causal.cfg.d_mlp)
    }


def test_the_linear_part_of_a_log_probability(causal):
    graph = cm.flow(causal, TEXT, target=" are")
    with torch.no_grad():
        logits = causal(causal.to_tokens(TEXT))[0, -1].double()
    p = logits.softmax(-1)
    token = int(graph.target.ids[0, 0])
    assert graph.score == pytest.approx(float(logits[token] - (p * logits).sum()), abs=1e-4)
    entropy = float(-(p * p.log()).sum())
    assert graph.log_prob == pytest.approx(graph.score - entropy, abs=1e-4)
    conserved(graph, 1e-4)


def test_what_hooks_add_and_take_is_in_the_graph(causal):
    def ablate(z, hook):
        z[:, :, 0] = 0
        return z

    def steer(stream, hook):
        return stream + 0.1

    hooks = [("blocks.3.attn.hook_z", ablate), ("blocks.2.hook_resid_pre", steer)]
    with causal.hooks(fwd_hooks=hooks):
        graph = cm.flow(causal, TEXT, **ARE, share=1.0)
    conserved(graph, 1e-5)
    assert not [node for node in graph.nodes if node.label == "L3H0"]
    with (
        pytest.raises(cm.UnsupportedModel, match="do not add up"),
        causal.hooks(fwd_hooks=[("blocks.1.attn.hook_v", lambda v, hook: v * 2)]),
    ):
        cm.flow(causal, TEXT, **ARE)


def test_a_masked_language_model_has_a_gradient_at_its_head():
    graph = cm.flow(cm.load_demo("masked-lm"), "the keys to the cabinet [MASK] here .")
    conserved(graph, 1e-4)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"pos": "all"}, "6 predictions"),
        ({"target": " are on"}, "2 predictions"),
        ({"target": [" are", " is"]}, "one target for each"),
        ({"share": 0.0}, "above 0"),
        ({"k": 0}, "from 1"),
    ],
)
def test_what_is_no_graph_is_refused(causal, asked, words):
    with pytest.raises(cm.InvalidInput, match=words):
        cm.flow(causal, TEXT, **asked)


# ---- what the result can do


def test_tables_and_files(causal, tmp_path):
    graph = cm.flow(causal, TEXT, **ARE)
    assert Result.load(graph.save(tmp_path / "graph.safetensors")).equals(graph)
    nodes, edges = graph.to_dataframe(), graph.to_dataframe("edges")
    assert nodes.label.tolist() == [node.label for node in graph.nodes]
    into = edges.groupby("target").score.sum()
    assert into[len(graph.nodes) - 1] == pytest.approx(graph.score, abs=1e-4)
    assert edges.score.abs().is_monotonic_decreasing
    assert "' are' rather than ' is'" in repr(graph)
    assert "L3H0" in repr(graph)
    with pytest.raises(cm.InvalidInput, match="edges"):
        graph.to_dataframe("links")


def test_graphml_and_back(causal, tmp_path):
    import networkx

    graph = cm.flow(causal, TEXT, **ARE)
    made = graph.to_networkx()
    networkx.write_graphml(made, tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int)
    assert networkx.is_directed_acyclic_graph(read)
    answer = len(graph.nodes) - 1
    total = sum(edge["weight"] for _, _, edge in read.in_edges(answer, data=True))
    assert total == pytest.approx(graph.score, abs=1e-4)
    assert read.nodes[answer]["label"] == "answer"


def fields(**types: Any) -> dict[str, Any]:
    """The schema of an object that has these fields."""
    kinds = {name: {"type": kind} for name, kind in types.items()}
    return {"type": "object", "properties": kinds, "required": [*types]}


def readable(told: Any) -> None:
    """What Neuronpedia's schema and circuit-tracer's reader ask of a graph file."""
    import jsonschema

    text, number = "string", "number"
    node = fields(
        node_id=text, feature="integer", layer=text, ctx_idx="integer", feature_type=text,
        jsNodeId=text, clerp=text, influence=number, activation=number,
    )  # fmt: skip
    link = fields(source=text, target=text, weight=number)
    whole = fields(metadata="object", qParams="object", nodes="array", links="array")
    whole["properties"] = {
        "metadata": fields(slug=text, scan=text, prompt=text, prompt_tokens="array"),
        "qParams": fields(pinnedIds="array", supernodes="array", linkType=text, clickedId=text),
        "nodes": {"type": "array", "items": node},
        "links": {"type": "array", "items": link},
    }
    jsonschema.validate(told, whole)
    count = len(told["metadata"]["prompt_tokens"])
    assert all(0 <= node["ctx_idx"] < count for node in told["nodes"])
    # The viewer reads the probability off the label.
    (answer,) = (node for node in told["nodes"] if node["feature_type"] == "logit")
    assert 0 <= float(answer["clerp"].split("(p=")[1].split(")")[0]) <= 1


def test_circuit_tracers_own_reader_takes_the_files(causal):
    """Where it is installed, which pins versions of its own."""
    models = pytest.importorskip("circuit_tracer.frontend.graph_models")
    told = cm.flow(causal, TEXT, **ARE, neurons=True, k=30).to_circuit_tracer("keys")
    read = models.Model.model_validate(told)
    assert [node.node_id for node in read.nodes] == [node["node_id"] for node in told["nodes"]]


@pytest.mark.parametrize("neurons", [False, True])
def test_circuit_tracer_files(causal, neurons):
    graph = cm.flow(causal, TEXT, **ARE, neurons=neurons, k=30)
    told = json.loads(json.dumps(graph.to_circuit_tracer("keys"), allow_nan=False))
    readable(told)
    ids = [node["node_id"] for node in told["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    assert len({node["jsNodeId"] for node in told["nodes"]}) == len(ids)
    assert {end for link in told["links"] for end in (link["source"], link["target"])} <= {*ids}
    into = sum(link["weight"] for link in told["links"] if link["target"] == ids[-1])
    assert into == pytest.approx(graph.score, abs=1e-4)
    assert {"slug", "scan", "prompt", "prompt_tokens"} <= told["metadata"].keys()
    assert {"embedding", "logit"} <= {node["feature_type"] for node in told["nodes"]}


def test_circuit_trace_files_have_one_row_of_tokens():
    case = case_of("t5")
    with pytest.raises(cm.InvalidInput, match="one stack"):
        graph_of(case, k=5).to_circuit_tracer()


def view_batch(view: Any, given: dict[str, Any]) -> Any:
    """The batch of some ids."""
    from tl_contextmix.adapters.inputs import Given, make_batch

    some = {k: v for k, v in given.items() if k in ("decoder_input",)}
    return make_batch(view, Given(given["input"], **some))
