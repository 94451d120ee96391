"""Attribution graphs: sums, edges against a literal forward pass with a gate on every edge."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy
import pytest
import torch
import zoo
from asked import bound, case_of, keywords, shared, view_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tl_contextmix as cm
from tl_contextmix.core.blocks import AttentionSublayer, FeedForward, Trace
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.results import AttributionGraph
from tl_contextmix.results.attribution_graph import SOURCES

CASES = [case for case in zoo.cases() if case.family not in zoo.OPAQUE_FEED_FORWARD]
TEXT = "the keys to the cabinet"
ARE = {"target": " are", "foil": " is"}


def one(given: zoo.Inputs) -> dict[str, Any]:
    """The first sentence of a zoo input, and a prediction."""
    ids = {name: value[:1] for name, value in keywords(given).items()}
    return {"input": given.tokens[:1], "pos": -1, **ids}


def graph_of(case: zoo.Case, **options: Any) -> AttributionGraph:
    """The graph of a contrast of two tokens."""
    model, given = shared(case)
    return cm.flow(model, **{**one(given), "target": 3, "foil": 5, **options})


def conserved(graph: AttributionGraph, limit: float) -> None:
    """Edges into a node and out of it, and what enters the graph, add up to the scores."""
    size = float(graph.scores.abs().max())
    source = torch.tensor([node.kind in SOURCES for node in graph.nodes])
    source |= torch.tensor([n.kind.endswith("rest") and n.layer < 0 for n in graph.nodes])
    into, out = graph.edges.sum(dim=1), graph.edges.sum(dim=0)
    assert float((into - graph.scores)[~source].abs().max()) < limit * size
    assert float((out - graph.scores)[:-1].abs().max()) < limit * size
    assert float(into[source].abs().max()) == 0
    assert float((graph.scores[source].sum() - graph.score).abs()) < limit * size
    assert float(graph.scores[-1]) == pytest.approx(graph.score, abs=limit * size)
    assert graph.nodes[-1].kind == "answer"


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


def frozen(norm: Norm | None, parts: dict[Any, Tensor], bias: Any) -> dict[Any, Tensor]:
    """Parts after a norm whose scale is that of their sum, its bias being one of them."""
    if norm is None:
        return dict(parts)
    whole = sum(parts.values()).detach()
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

    def read(self, reader: Any, parts: dict[Any, Tensor]) -> dict[Any, Tensor]:
        found = {}
        for name, part in parts.items():
            gate = self.gates.setdefault((reader, name), torch.ones((), dtype=part.dtype))
            found[name] = part * gate.requires_grad_()
        return found

    def stack(self, name: str, memory: dict[Any, Tensor] | None) -> dict[Any, Tensor]:
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
                parts = self.attention(attention, block.layer, parts, memory, prefix, bias)
            read = before if block.parallel else parts
            parts = self.feed_forward(block.feed_forward, block.layer, parts, read, prefix, bias)
        return parts

    def after(self, sub: Any, parts: Any, written: Any, constant: Any, bias: Any) -> Any:
        like = next(iter(parts.values()))
        if constant is not None:
            written = {**written, bias: constant.expand_as(like)}
        total = defaultdict(lambda: torch.zeros_like(like), parts)
        for name, part in frozen(sub.norm_out, written, bias).items():
            total[name] = total[name] + part
        return frozen(sub.norm_after, dict(total), bias)

    def attention(
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
                read = sum(self.read(name, seen).values())
                value = read @ W_V[head]
                if b_V is not None:
                    gate = self.gates.setdefault((name, bias), torch.ones((), dtype=read.dtype))
                    value = value + gate.requires_grad_() * b_V[head]
                row = torch.zeros_like(next(iter(parts.values())))
                written[name] = row.index_put(
                    (torch.tensor(pos),), pattern[head, pos] @ value @ W_O[head]
                )
        return self.after(sub, parts, written, sub.b_O, bias)

    def feed_forward(
        self, ff: FeedForward, layer: int, parts: Any, source: Any, prefix: str, bias: Any
    ) -> Any:
        seen, written = frozen(ff.norm_in, source, bias), {}
        whole = sum(seen.values()).detach()
        totals = [whole @ w + (0 if b is None else b) for w, b in ff.branches()]
        slopes, start = self.slopes(ff, totals)
        for pos in range(len(whole)):
            name = (f"{prefix}mlp", layer, pos, -1)
            read = sum(self.read(name, seen).values())[pos]
            gate = self.gates.setdefault((name, bias), torch.ones((), dtype=read.dtype))
            post = gate.requires_grad_() * start
            for (w, b), slope in zip(ff.branches(), slopes, strict=True):
                post = post + slope[pos] * (read @ w + (0 if b is None else gate * b))
            written[name] = torch.zeros_like(whole).index_put(
                (torch.tensor(pos),), post @ ff.W_out
            )
        return self.after(ff, parts, written, ff.constant(), bias)

    @staticmethod
    def slopes(ff: FeedForward, totals: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        act, zero = ff.activation, torch.zeros_like(totals[0][0])
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
            memory = self.stack("encoder", None)
            last = ("encoder bias", len(stacks["encoder"]) - 1, -1, -1)
            memory = frozen(self.view.final_norms.get("encoder"), memory, last)
        name = "decoder" if "decoder" in stacks else "encoder"
        parts = self.stack(name, memory)
        bias = ("readout bias", len(stacks[name]), -1, -1)
        read = frozen(self.view.readout.norm, parts, bias)
        answer = ("answer", len(stacks[name]), row, -1)
        total = sum(self.read(answer, read).values())[row] * self.view.readout.scale
        score = total @ columns
        grads = torch.autograd.grad(score, [*self.gates.values()], allow_unused=True)
        return {
            key: 0.0 if grad is None else float(grad)
            for key, grad in zip(self.gates, grads, strict=True)
        }


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


def view_batch(view: Any, given: dict[str, Any]) -> Any:
    """The batch of some ids."""
    from tl_contextmix.adapters.inputs import Given, make_batch

    some = {k: v for k, v in given.items() if k in ("decoder_input",)}
    return make_batch(view, Given(given["input"], **some))
