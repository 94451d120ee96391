"""Langedijk, Mohebbi, Sarti, Zuidema, Jumelet: DecoderLens (Findings of NAACL 2024).

    python reproductions/decoder_lens.py
    python reproductions/decoder_lens.py --task mt,qa,logic,asr
    python reproductions/decoder_lens.py --model google/flan-t5-base --data wikipedia-dev.json
    python reproductions/decoder_lens.py --model NAME --language fr --data eng.dev,fra.dev

--data: rows (JSON, JSON lines, CSV or TSV) with source, target (a text, or a list of those that are
right) and category; TriviaQA's JSON (https://nlp.cs.washington.edu/triviaqa/); or two files with a
sentence per line, as FLORES-101 has for each language (https://github.com/facebookresearch/flores).
--order: two categories of the file, the easier one first, to score what the paper claims of them.
--task: the embedded translator, and models that are trained here first: questions of one step and
two, satisfiable formulas, tones in the shape of speech. The paper's model of formulas is no model
of Hugging Face's, and recordings are not read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import tiny_tasks
import torch
from claims import Claim, Reproduction, apart, load, read_options, rows_of
from grammar_fr import TranslationGrammar

import tl_contextmix as cm
from tl_contextmix.core.text_metrics import edit_distance
from tl_contextmix.evaluation import alias_match, assigns_variables, label_tokens, satisfies

WORDS = "“simpler subtasks are solved with high precision by low and intermediate encoder layers”"
KNOWN = "of what the last layer has right"
STEPS = {"qa": 3000, "logic": 900, "asr": 500}


def order_claim(easy: str, hard: str) -> Claim:
    """Returns that a subtask is solved by a lower layer than another one."""
    return Claim(
        f"{easy} before {hard}",
        WORDS,
        "abstract, as published",
        f"share right from the middle encoder layer, {easy} less {hard}, {KNOWN}",
    )


def precise_claim(easy: str) -> Claim:
    """Returns that an intermediate layer solves a subtask with high precision."""
    return Claim(
        f"{easy}: high precision",
        WORDS,
        "abstract, as published",
        f"share right from the middle encoder layer, {easy}, {KNOWN}",
        0.8,
    )


def middle(said: Any) -> int:
    """Returns the place of the middle encoder layer."""
    return len(said.layers) // 2


def subtasks(
    found: Reproduction, name: str, order: tuple[str, str], right: dict[str, torch.Tensor]
) -> None:
    """Scores the order of two subtasks by what each sentence has right [sentence]; NaN: nothing."""
    easy, hard = order
    both = right[easy] - right[hard]
    kept = {label: values[~values.isnan()] for label, values in right.items()}
    if all(len(some) for some in kept.values()) and bool(both.isnan().all()):
        # Of different sentences.
        found.score(
            order_claim(easy, hard), name, both.nan_to_num(), interval=apart(kept[easy], kept[hard])
        )
    else:
        found.score(order_claim(easy, hard), name, both)
    found.score(precise_claim(easy), name, kept[easy])


def translate(found: Reproduction, model: Any, count: int) -> None:
    """Scores words that a dictionary gives against those that need context."""
    pairs = TranslationGrammar(7, "test").translations(count)
    english, french = ([getattr(p, s) for p in pairs] for s in ("source_text", "target_text"))
    judged = cm.decoder_lens(model, english, french, mode="teacher_forced")
    spans = label_tokens(judged.target, french, [pair.contexts for pair in pairs])
    kinds = [[""] * int(real.sum()) for real in judged.target.mask]
    for row, some in enumerate(spans):
        for start, stop, label in some:
            kinds[row][start:stop] = [label] * (stop - start)
    curves = judged.metrics(
        metric=["accuracy", "MRR"], categories=[[k or "other" for k in row] for row in kinds]
    )
    found.show("encoder-decoder: words by what they need", "Given the right words before.", curves)
    found.table("encoder-decoder: words", "By layer and what they need.", curves.to_dataframe())
    hit = (judged.ranks == 0).double()
    hit = torch.where(hit[:, -1] == 1, hit[:, middle(judged)], torch.nan)
    right = {"dictionary words": [], "words in context": []}
    for row, some in enumerate(kinds):
        easy = torch.tensor([kind == "dictionary" for kind in some])
        hard = torch.tensor([kind not in ("dictionary", "") for kind in some])
        mine = hit[row, : len(some)]
        right["dictionary words"].append(mine[easy].nanmean())
        right["words in context"].append(mine[hard].nanmean())
    values = {label: torch.stack(some) for label, some in right.items()}
    subtasks(found, "encoder-decoder", ("dictionary words", "words in context"), values)
    said = cm.decoder_lens(model, english[:5])
    found.show("encoder-decoder: five translations", "What the decoder says.", said)
    stable = pandas.Series(cm.decoder_lens(model, english).first_stable_layer())
    text = "How many translations stay the same from a layer on."
    found.table(
        "encoder-decoder: first stable layer",
        text,
        stable.value_counts().sort_index().rename_axis("layer").reset_index(name="count"),
    )


def outputs(found: Reproduction, name: str, said: Any, checks: dict[str, Any], kinds: Any) -> Any:
    """Shows metrics of outputs by layer and category; returns each check at the middle layer.

    NaN where the whole model does not pass all checks: what it cannot do, no layer solves.
    """
    curves = said.metrics(metric=checks, categories=kinds)
    found.show(f"{name}: subtasks by layer", "", curves)
    found.table(f"{name}: subtasks", "By layer and kind of input.", curves.to_dataframe())
    frame = said.sentence_metrics(metric=checks)
    whole, half = (
        frame[frame.layer == layer].pivot(index="batch", columns="quantity", values="value")
        for layer in (said.layers[-1], said.layers[middle(said)])
    )
    half = half.where((whole == 1).all(axis=1), float("nan"))
    return {label: torch.tensor(half[label].to_numpy()) for label in checks}


def of_kind(right: torch.Tensor, kinds: Sequence[str], kind: str) -> torch.Tensor:
    """Returns what sentences of one kind have right; NaN for others."""
    return torch.where(torch.tensor([k == kind for k in kinds]), right, torch.nan)


def same(out: str, reference: str | None, source: str) -> float:
    """Returns whether an output is the reference."""
    return float(out.split() == (reference or "").split())


def word_errors(out: str, reference: str | None, source: str) -> float:
    """Returns how many words have to change, over those of the reference."""
    right = (reference or "").split()
    return edit_distance(out.split(), right) / len(right)


def questions(found: Reproduction, count: int, steps: int) -> None:
    """Scores questions of one step against those of two."""
    model, examples = _text_task(tiny_tasks.question, count, steps)
    kinds = [one.kind for one in examples]
    said = cm.decoder_lens(model, [e.source for e in examples], [e.target for e in examples])
    right = outputs(found, "qa", said, {"exact match": same}, kinds)["exact match"]
    order = ("one step", "two steps")
    subtasks(found, "qa", order, {kind: of_kind(right, kinds, kind) for kind in order})


def logic(found: Reproduction, count: int, steps: int) -> None:
    """Scores whether an assignment is of the right variables against whether it is right."""
    model, examples = _text_task(tiny_tasks.formula, count, steps)
    said = cm.decoder_lens(model, [e.source for e in examples], [e.target for e in examples])
    checks = {"assigns every variable": assigns_variables, "satisfies the formula": satisfies}
    right = outputs(found, "logic", said, checks, [e.kind for e in examples])
    subtasks(found, "logic", ("assigns every variable", "satisfies the formula"), right)


def _text_task(draw: tiny_tasks.Draw, count: int, steps: int) -> tuple[Any, list[Any]]:
    hf, tokenizer = tiny_tasks.train_text(draw, steps)
    rng = random.Random(10**6)
    return cm.load_model(hf, tokenizer=tokenizer), [draw(rng) for _ in range(count)]


def speech(found: Reproduction, count: int, steps: int) -> None:
    """Scores how many tones there are against which they are."""
    model, tokenizer = tiny_tasks.train_speech(steps)
    rng = random.Random(10**6)
    some = [tiny_tasks.tones(rng) for _ in range(count)]
    features, texts = torch.stack([x for x, _ in some]), [text for _, text in some]
    said = cm.decoder_lens(model, features, texts, tokenizer=tokenizer, max_new_tokens=8)
    checks = {
        "number of tones": lambda out, right, _: float(len(out.split()) == len(right.split())),
        "every tone": same,
    }
    rates = said.metrics(metric={"word error rate": word_errors})
    found.table("asr: word error rate", "By layer, mean over inputs.", rates.to_dataframe())
    right = outputs(found, "asr", said, checks, None)
    subtasks(found, "asr", ("number of tones", "every tone"), right)


@dataclass(frozen=True)
class Asked:
    """A line of a file.

    Attributes:
        source: The input.
        answers: Right answers.
        kind: Its category.
    """

    source: str
    answers: tuple[str, ...]
    kind: str


def asked_of(data: str) -> list[Asked]:
    """Returns the lines of a file in one of the formats named above."""
    first, *second = data.split(",")
    if second:
        sides = [Path(file).read_text(encoding="utf-8").splitlines() for file in (first, *second)]
        return [Asked(source, (target,), "") for source, target in zip(*sides, strict=True)]
    if Path(first).suffix == ".json":
        whole = json.loads(Path(first).read_text(encoding="utf-8"))
        if isinstance(whole, dict) and "Data" in whole:
            return [
                Asked(one["Question"], (one["Answer"]["Value"], *one["Answer"]["Aliases"]), "")
                for one in whole["Data"]
            ]
    return [
        Asked(row["source"], tuple(answers), str(row.get("category") or ""))
        for row in rows_of(first)
        for answers in [[row["target"]] if isinstance(row["target"], str) else row["target"]]
    ]


def given_data(found: Reproduction, name: str, model: Any, options: Any) -> None:
    """Shows what the decoder says of a file, layer by layer."""
    asked = asked_of(options.data)[: options.limit]
    sources, kinds = [one.source for one in asked], [one.kind or "other" for one in asked]
    references = [one.answers[0] for one in asked]
    how = {"language": options.language} if options.language else {}
    said = cm.decoder_lens(model, sources, references, **how)
    match = {"exact match": alias_match({one.source: one.answers for one in asked})}
    grouped = kinds if any(one.kind for one in asked) else None
    curves = said.metrics(metric=match | {"chrF": "chrF"}, categories=grouped)
    judged = cm.decoder_lens(model, sources, references, mode="teacher_forced", **how)
    curves += judged.metrics(metric="MRR", categories=grouped)
    found.show(f"{name}: answers by layer", "MRR: of the first answer's tokens.", curves)
    found.show(f"{name}: five outputs", "What the decoder says.", *said.panels()[:5])
    found.table(f"{name}: answers", "By layer and category.", curves.to_dataframe())
    if options.order:
        right = outputs(found, name, said, match, grouped)["exact match"]
        easy, hard = options.order.split(",")
        values = {kind: of_kind(right, kinds, kind) for kind in (easy, hard)}
        subtasks(found, name, (easy, hard), values)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=100,
        model="encoder-decoder",
        task={"default": "mt,qa,logic,asr", "help": "mt, qa, logic, asr (default: %(default)s)"},
        steps={"type": int, "default": 0, "help": "steps of training, where not the usual"},
        language="language that a model with several is to write",
        order="two categories of the file, with a comma, the easier one first",
    )
    found = Reproduction("decoder_lens", "langedijk2024decoderlens", options)
    tasks = {"qa": questions, "logic": logic, "asr": speech}
    if options.data:
        for name, model in load(options.model).items():
            given_data(found, name, model, options)
        return found.write()
    for task in options.task.split(","):
        if task == "mt":
            translate(found, cm.load_demo("encoder-decoder"), options.limit)
        else:
            tasks[task](found, options.limit, options.steps or STEPS[task])
    return found.write()


if __name__ == "__main__":
    main()
