"""Yu, Ananiadou: Neuron-Level Knowledge Attribution in Large Language Models (EMNLP 2024).

    python reproductions/log_prob_increase.py
    python reproductions/log_prob_increase.py --model gpt2-large --data facts.jsonl

--data: rows (JSON, JSON lines, CSV or TSV) with prompt, target and category, or known_1000.json or
counterfact.json (https://rome.baulab.info/data/dsets/). The paper has six types of knowledge from
TriviaQA; its repository (https://github.com/zepingyu0512/neuron-attribution) has no file of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, load, read_options, rows_of

import tl_contextmix as cm
from tl_contextmix.evaluation import demo_pairs, knockout_curve, log_prob_path
from tl_contextmix.evaluation.prompt_rows import read_row

OURS: Any = "log_prob_increase"
RIVALS: tuple[Any, ...] = (
    *("log_prob", "prob_increase", "norm", "coefficient"),
    *("rank", "coefficient_norm", "coefficient_rank"),
)
METRICS = ("log_prob", "probability", "reciprocal_rank")
WORDS = "“Compared to seven other methods, our approach demonstrates superior performance"


def better_claim(metric: str) -> Claim:
    """Returns that removing what the score finds does more than what the best rival finds."""
    return Claim(
        f"superior by {metric.replace('_', ' ')}",
        f"{WORDS} across three metrics”",
        "abstract; table 2",
        f"fall of the {metric.replace('_', ' ')} when a score's best neurons are removed, less "
        "that of the best rival",
    )


FEW = Claim(
    "few neurons carry a fact",
    "without 300 neurons nearly all of the answer's probability is gone",
    "table 13",
    "share of the probability that goes with the best 2 % of the FF neurons, less that with as "
    "many random ones",
    0.5,
)
QUERY = Claim(
    "query neurons matter",
    '“identifying "query neurons" which activate these "value neurons"”',
    "abstract; table 7",
    "fall of the log-probability when the best query neurons are removed, less that with random "
    "ones",
)
DEEP = Claim(
    "value neurons are deep",
    "the ten most important layers are deep ones",
    "figures 4 and 5",
    "mean layer of a fact's best value neurons less the middle of the layers",
)
BEFORE = Claim(
    "query neurons are shallower than value neurons",
    "shallow neurons activate the deep value neurons",
    "figure 1",
    "mean layer of the best value neurons less that of the best query neurons, of facts with both",
)
BOTH = Claim(
    "attention and FF layers both carry the answer",
    "both attention and FFN layers store knowledge",
    "table 3",
    "smaller one of the log-probability increases of all attention and of all FF layers, in nats",
)
PATH = Claim(
    "the probability rises late, its logarithm early",
    "from the first state to the last, the probability rises in the last part of the way only",
    "figure 3",
    "half-way share of the rise in log-probability less that in probability",
)


def facts(options: Any) -> tuple[list[str], list[str], list[str]]:
    """Returns prompts, answers and relations."""
    if options.data:
        lines = map(json.dumps, rows_of(options.data)[: options.limit])
        rows = [read_row(line, {}, causal=True) for line in lines]
        return [r.text for r in rows], [r.target for r in rows], [r.category for r in rows]
    pairs = demo_pairs("fact", count=options.limit, lures=False)
    prompts = [pair.prefix for pair in pairs]
    # The grammar's sentences of one kind differ in names alone.
    kinds = [
        " ".join(re.findall(r"\b(?:capital|people|spoken|city|in)\b", text)) for text in prompts
    ]
    return prompts, [" " + pair.answer for pair in pairs], kinds


def scores(found: Reproduction, name: str, model: Any, asked: Any, k: int) -> Any:
    """Compares the scores by what removing their best neurons does; returns those of ours."""
    prompts, targets, _ = asked
    falls, rows, ours = {}, [], None
    for score in (OURS, *RIVALS):
        best = cm.log_prob_contributions(
            model, prompts, target=targets, by="ff_neuron", score=score, k=k
        )
        ours = best if score == OURS else ours
        out = cm.knockout(model, prompts, target=targets, neurons=best, everywhere=True, controls=0)
        falls[score] = out.before - out.after
        rows.append({"score": score, **dict(zip(METRICS, out.after.mean(0).tolist(), strict=True))})
    for place, metric in enumerate(METRICS):
        rival = max(RIVALS, key=lambda one: float(falls[one][:, place].mean()))
        found.score(better_claim(metric), name, (falls[OURS] - falls[rival])[:, place])
    text = f"What is left of the answers without the {k} neurons of each score."
    found.table(f"{name}: eight scores (table 2)", text, pandas.DataFrame(rows))
    return ours


def neurons(found: Reproduction, name: str, model: Any, asked: Any, ours: Any, k: int) -> None:
    """Scores where value and query neurons are, and what they carry."""
    prompts, targets, _ = asked
    depth = int(model.cfg.n_layers)
    few = round(0.02 * depth * int(model.cfg.d_mlp))
    best = cm.log_prob_contributions(model, prompts, target=targets, by="ff_neuron", k=few)
    out = cm.knockout(model, prompts, target=targets, neurons=best, everywhere=True)
    lost, random = out.before - out.after, out.before - out.controls.mean(1)
    found.score(FEW, name, ((lost - random) / out.before)[:, 1])
    values = ours.components.layer.double().mean(1)
    found.score(DEEP, name, values - (depth - 1) / 2)
    try:
        query = cm.query_contributions(model, prompts, neurons=ours, by="ff_neuron", k=k).top(k)
    except cm.InvalidInput:  # every value neuron is of the first layer, which reads no other one
        for claim in (QUERY, BEFORE):
            found.score(claim, name, [])
        return
    removed = cm.knockout(model, prompts, target=targets, neurons=query, everywhere=True)
    found.score(QUERY, name, (removed.controls.mean(1) - removed.after)[:, 0])
    layer, empty = query.components.layer.double(), query.components.is_empty()
    found.score(BEFORE, name, values - torch.where(empty, torch.nan, layer).nanmean(1))


def layers(found: Reproduction, name: str, model: Any, asked: Any) -> None:
    """Scores which layers raise the answer, and shows the best heads."""
    prompts, targets, relations = asked
    parts = cm.log_prob_contributions(model, prompts, target=targets)
    frame = parts.to_dataframe()
    sums = frame[frame.kind.isin(["attn", "mlp"])].groupby(["batch", "kind"]).score.sum().unstack()
    found.score(BOTH, name, torch.tensor(sums.min(axis=1).to_numpy()))
    frame = frame.assign(relation=[relations[row] for row in frame.batch])
    by = frame.groupby(["relation", "layer", "kind"]).score.mean().reset_index()
    found.table(f"{name}: layers by relation", "Nats.", by)
    heads = cm.log_prob_contributions(model, prompts, target=targets, by="head").top(3)
    frame = heads.to_dataframe().assign(relation=lambda one: [relations[row] for row in one.batch])
    by = frame.groupby(["relation", "layer", "head"]).score.agg(["mean", "count"]).reset_index()
    found.table(f"{name}: best heads by relation", "Nats; how many facts have it.", by)


def path(found: Reproduction, name: str, model: Any, asked: Any) -> None:
    """Scores how late a probability and how early its logarithm rises."""
    prompts, targets, _ = asked
    way = log_prob_path(model, prompts, target=targets)
    steps = {
        metric: way.pivot(index="batch", columns="share", values=metric).to_numpy()
        for metric in ("log_prob", "probability")
    }
    middle = {
        metric: (v[:, v.shape[1] // 2] - v[:, 0]) / (v[:, -1] - v[:, 0])
        for metric, v in steps.items()
    }
    found.score(PATH, name, torch.tensor(middle["log_prob"] - middle["probability"]))
    means = way.groupby("share")[["log_prob", "probability"]].mean().reset_index()
    found.table(
        f"{name}: along the stream (figure 3)", "From what enters to the last state.", means
    )


def chains(found: Reproduction, name: str, model: Any, asked: Any, facts: int = 3) -> None:
    """Shows who speaks for the answers of some facts, and what activates it."""
    rows = []
    for prompt, target, _ in [*zip(*asked, strict=True)][:facts]:
        about: dict[str, Any] = {"target": target, "k": 1}
        value = cm.log_prob_contributions(model, prompt, by="ff_neuron", **about)
        read = cm.log_prob_contributions(model, prompt, by="attn_neuron", **about)
        chain = {"prompt": prompt, "answer": target}
        for what, one in (("value FF neuron", value), ("value attention neuron", read)):
            words = cm.component_readouts(model, prompt, components=one, k=5).top_words[0][0]
            chain |= {what: one.labels()[0], f"{what} raises": " ".join(words)}
        head = read.components.at(0, 0)
        if head["layer"]:  # what the first layer reads, no neuron wrote
            query = cm.query_contributions(model, prompt, neurons=read, by="ff_neuron", k=1)
            place = {what: query.components.at(0, 0)[what] for what in ("layer", "neuron")}
            via = head["layer"], head["head"]
            through = cm.ff_values(
                model, layer=place["layer"], neurons=place["neuron"], via=via, k=5
            )
            chain["query FF neuron"] = query.labels()[0]
            for what, negative in (("raises", False), ("lowers", True)):
                words = through.tokens(**place, negative=negative)
                chain[f"its value {what} through the head"] = " ".join(words)
        rows.append(chain)
    text = (
        "The best FF and attention neuron of each fact, what they raise, and the FF neuron that "
        "activates the attention neuron most, with what the head makes of its value."
    )
    found.table(f"{name}: chains of {len(rows)} facts", text, pandas.DataFrame(rows).fillna(""))


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=60,
        model="causal-lm",
        neurons={"type": int, "default": 10, "help": "how many neurons are removed"},
    )
    k = options.neurons
    found = Reproduction("log_prob_increase", "yu2024neuron", options)
    for name, model in load(options.model).items():
        asked = facts(options)
        ours = scores(found, name, model, asked, k)
        neurons(found, name, model, asked, ours, k)
        layers(found, name, model, asked)
        path(found, name, model, asked)
        chains(found, name, model, asked)
        more = cm.log_prob_contributions(model, asked[0], target=asked[1], by="ff_neuron", k=5 * k)
        counts = [max(1, k // 10), max(1, k // 3), k, 3 * k, 5 * k]
        curve = knockout_curve(
            model, asked[0], more, counts=counts, everywhere=True, target=asked[1]
        )
        found.table(f"{name}: more and more neurons", "With as many random ones.", curve)
        overlap = ours.overlap(k, categories=asked[2])
        found.table(
            f"{name}: shared neurons",
            f"Share of a fact's {k} neurons that another one has, by relation.",
            overlap.rename_axis("relation").reset_index(),
        )
    return found.write()


if __name__ == "__main__":
    main()
