"""Which nodes an answer rests on: attribution graphs against their baselines, by ablation.

``python benchmarks/flow.py [--prompts N] [--write]`` asks the embedded language model about verbs
and their subjects (with another noun in between), about facts and about names (the indirect
object), each answer against its wrong twin. Four rankings of embeddings, heads and feed-forward
blocks are compared, 50 nodes of each: by `flow`'s effect, by circuit-tracer's influence on the same
graph, by information flow routes, and random ones of the same layers. Prompts that the model gets
wrong are skipped. Figures are means over prompts with 95 % bootstrap intervals:

* left: how much of the difference of log-probabilities is left in the model where all other nodes
  are replaced by their means over the prompt.
* linearised: the same with patterns, norms and slopes frozen.
* falls by: how much of it is lost without the nodes.
* cues: how many of the words that decide the answer (the subject, a fact's subject and relation,
  the name that is not repeated) have their embedding among the nodes.
* largest: how often the largest embedding is that of such a word.
* rank correlation of size and effect of each node alone.

``--write`` puts the table into docs/pages/methods/flow.md. Takes three minutes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from meters import command_line, markdown, show, with_interval
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.statistics import spearman
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.methods.flow_knockout import flow_knockout
from tl_contextmix.results import AttributionGraph

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "methods" / "flow.md"
_MARKED = re.compile(r"(<!-- flow -->\n).*?(<!-- end of flow -->)", re.DOTALL)
KINDS = {"agreement": "subject and verb", "fact": "fact", "name": "indirect object"}
RELATIONS = ("capital", "speak", "spoken")
NODES = 50
SOME = 16
RANKINGS = ("flow", "influence", "information flow routes")
RANDOM = "random nodes of flow's layers"
FIGURES = (
    f"left, {SOME} nodes",
    f"left, {NODES} nodes",
    f"linearised, {NODES} nodes",
    "falls by",
    "cues",
    "largest",
    "rank correlation",
)
_EVERY = 100_000


class Asked(NamedTuple):
    """A prompt, its answer, and the positions of what decides it."""

    prompt: str
    target: str
    foil: str
    cues: frozenset[int]


def cases(model: Any, kind: str, count: int) -> Iterator[Asked]:
    """Yields prompts that the model gets right."""
    for pair in demo_pairs(kind, count=count, lures=kind != "fact"):
        good, wrong = pair.good.split(), pair.bad.split()
        at = next(i for i, (a, b) in enumerate(zip(good, wrong, strict=True)) if a != b)
        prompt = " ".join(good[:at])
        starts = {len(" ".join(good[:place])) + (place > 0): place for place in range(at)}
        # One token a word, after BOS.
        cues = {1 + starts[start] for start, _ in pair.cues}
        cues |= {1 + place for place in range(at) if kind == "fact" and good[place] in RELATIONS}
        one = Asked(prompt, f" {good[at]}", f" {wrong[at]}", frozenset(cues))
        tokens = model.to_tokens(prompt).shape[1]
        single = all(len(model.to_tokens(w, prepend_bos=False)[0]) == 1 for w in one[1:3])
        if tokens == at + 1 and single:
            yield one


def rankings(model: Any, asked: Asked) -> Iterator[tuple[str, AttributionGraph, Tensor]]:
    """Yields graphs of all nodes, each with the size that its nodes are ranked by."""
    about: Any = {"target": asked.target, "foil": asked.foil}
    graph = cm.flow(model, asked.prompt, **about, share=1.0, k=_EVERY)
    if graph.log_prob > 0:
        routes = cm.information_flow_routes(model, asked.prompt, **about, threshold=0.0)
        sizes = (graph.scores.abs(), graph.influence(), routes.scores)
        yield from zip(RANKINGS, (graph, graph, routes), sizes, strict=True)


def measured(model: Any, kind: str, count: int) -> dict[str, dict[str, list[float]]]:
    """Returns figures of every prompt, by ranking."""
    found: dict[str, dict[str, list[float]]] = {}
    for asked in cases(model, kind, count):
        for name, graph, sizes in rankings(model, asked):
            order = [p for p in sizes.argsort(descending=True).tolist() if graph.nodes[p].written]
            nodes = order[:NODES]
            options: Any = {"graph": graph, "nodes": nodes, "replace_with": "mean"}
            out = flow_knockout(model, asked.prompt, **options)
            kept = flow_knockout(model, asked.prompt, **options, others=True)
            embeds = [graph.nodes[p].pos for p in nodes if graph.nodes[p].kind == "embed"]
            few, most = kept.counts.index(SOME), len(kept.counts) - 1
            values = (
                1 - float(kept.together[few]) / out.log_prob,
                1 - float(kept.together[most]) / out.log_prob,
                1 - float(kept.linear[most]) / graph.score,
                float(out.together[most]) / out.log_prob,
                sum(cue in embeds for cue in asked.cues) / len(asked.cues),
                float(bool(embeds) and embeds[0] in asked.cues),
                float(spearman(sizes[nodes].double(), out.alone.abs().double())),
            )
            columns = found.setdefault(name, {})
            for figure, value in zip(FIGURES, values, strict=True):
                columns.setdefault(figure, []).append(value)
            if name == RANKINGS[0]:
                left, falls = 1 - kept.random / out.log_prob, out.random / out.log_prob
                columns = found.setdefault(RANDOM, {})
                values = (left[few], left[most], falls[most])
                for figure, value in zip((*FIGURES[:2], FIGURES[3]), values, strict=True):
                    columns.setdefault(figure, []).append(float(value.mean()))
    return found


def table(model: Any, count: int) -> str:
    """Returns the Markdown table."""
    rows = []
    for kind, says in KINDS.items():
        for name, figures in measured(model, kind, count).items():
            cells = [with_interval(figures[one]) if one in figures else "-" for one in FIGURES]
            prompts = len(figures[FIGURES[0]])
            rows.append([f"{says}, {prompts} prompts", name, *cells])
    return markdown(["task", "nodes by", *FIGURES], rows)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints, or puts the table into the page."""
    parser = command_line(__doc__)
    parser.add_argument("--prompts", type=int, default=20, help="how many of each kind")
    parser.add_argument("--write", action="store_true", help="update the page")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found = table(cm.load_demo("causal-lm"), given.prompts)
    show(found)
    if given.write:
        text = PAGE.read_text()
        PAGE.write_text(_MARKED.sub(lambda m: f"{m[1]}\n{found}\n{m[2]}", text))


if __name__ == "__main__":
    main()
