"""Langedijk, Mohebbi, Sarti, Zuidema, Jumelet: DecoderLens (Findings of NAACL 2024).

    python reproductions/decoder_lens.py
    python reproductions/decoder_lens.py --task mt,qa,logic,asr
    python reproductions/decoder_lens.py --model google/flan-t5-base --data questions.jsonl

--data: JSON lines with source, target (a text, or a list of those that are right) and category. The
paper has TriviaQA (https://nlp.cs.washington.edu/triviaqa/), propositional logic of DeepLTL,
FLORES-101 and Common Voice.
--task: the embedded translator, and models that are trained here first: questions of one step and
two, satisfiable formulas, tones in the shape of speech.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import tiny_tasks
import torch
from claims import Claim, Reproduction, apart, load, read_options
from grammar_fr import TranslationGrammar

import tl_contextmix as cm
from tl_contextmix.evaluation import (
    alias_match,
    assigns_variables,
    label_tokens,
    satisfies,
)

WORDS = "“simpler subtasks are solved with high precision by low and intermediate encoder layers”"
KNOWN = "of what the last layer has right"
STEPS = {"qa": 3000, "logic": 900, "asr": 500}


def order_claim(easy: str, hard: str) -> Claim:
    """Returns that a subtask is solved by a lower layer than another one."""
    return Claim(
        f"{easy} before {hard}",
        WORDS,
        "abstract",
        f"share right from the middle encoder layer, {easy} less {hard}, {KNOWN}",
    )


def precise_claim(easy: str) -> Claim:
    """Returns that an intermediate layer solves a subtask with high precision."""
    return Claim(
        f"{easy}: high precision",
        WORDS,
        "abstract",
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
    texts = said.references or [""] * len(said.inputs)

    def passed(place: int) -> dict[str, torch.Tensor]:
        rows = [*zip((row[place] for row in said.texts), texts, said.inputs, strict=True)]
        return {
            label: torch.tensor([float(check(*row)) for row in rows]).double()
            for label, check in checks.items()
        }

    known = torch.stack([*passed(-1).values()]).amin(0) == 1
    half = passed(middle(said))
    return {label: torch.where(known, values, torch.nan) for label, values in half.items()}


def same(out: str, reference: str | None, source: str) -> float:
    """Returns whether an output is the reference."""
    return float(out.split() == (reference or "").split())


def questions(found: Reproduction, count: int, steps: int) -> None:
    """Scores questions of one step against those of two."""
    model, examples = _text_task(tiny_tasks.question, count, steps)
    kinds = [one.kind for one in examples]
    said = cm.decoder_lens(model, [e.source for e in examples], [e.target for e in examples])
    right = outputs(found, "qa", said, {"exact match": same}, kinds)["exact match"]
    nothing = torch.tensor(torch.nan).double()
    values = {
        kind: torch.where(torch.tensor([k == kind for k in kinds]), right, nothing)
        for kind in ("one step", "two steps")
    }
    subtasks(found, "qa", ("one step", "two steps"), values)


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
    right = outputs(found, "asr", said, checks, None)
    subtasks(found, "asr", ("number of tones", "every tone"), right)


def given_data(found: Reproduction, name: str, model: Any, options: Any) -> None:
    """Shows what the decoder says of a file, layer by layer."""
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[: options.limit]
    rows = [json.loads(line) for line in lines if line.strip()]
    aliases = {
        row["source"]: [row["target"]] if isinstance(row["target"], str) else row["target"]
        for row in rows
    }
    said = cm.decoder_lens(model, [*aliases], [some[0] for some in aliases.values()])
    kinds = [str(row.get("category", "other")) for row in rows]
    curves = said.metrics(
        metric={"exact match": alias_match(aliases), "chrF": "chrF"}, categories=kinds
    )
    found.show(f"{name}: answers by layer", "", curves, said)
    found.table(f"{name}: answers", "By layer and category.", curves.to_dataframe())


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=100,
        model="encoder-decoder",
        task={"default": "mt,qa,logic,asr", "help": "mt, qa, logic, asr (default: %(default)s)"},
        steps={"type": int, "default": 0, "help": "steps of training, where not the usual"},
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
