"""Mohebbi, Zuidema, Chrupała, Alishahi: Quantifying Context Mixing (EACL 2023), Value Zeroing.

    python reproductions/value_zeroing.py
    python reproductions/value_zeroing.py --model bert-base-uncased,./finetuned --data FILE,FILE

--data: files of BLiMP (https://github.com/alexwarstadt/blimp, data/*.jsonl), with commas. The paper
has anaphor_number_agreement, determiner_noun_agreement_2, determiner_noun_agreement_with_adj_2,
distractor_agreement_relational_noun and regular_plural_subject_verb_agreement_1, whose cues are
derived from their sentences. Of any other file, a line may name its cues in a field "cues"; without
them there are no cue metrics. Contractions are written out, as the authors do. Folders of
fine-tuned models are models like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, load, read_options

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.statistics import spearman
from tl_contextmix.errors import FileFormatError
from tl_contextmix.evaluation import (
    MinimalPair,
    cue_alignment,
    demo_pairs,
    load_minimal_pairs,
    sentences_of,
)
from tl_contextmix.evaluation.compare import comparable
from tl_contextmix.results.scores import ALIGNMENT, Score, ScoreRow, ScoreTable

RIVALS = {
    "attention": "attention weights",
    "attention_norms attn_out": "norms (2020)",
    "attention_norms mlp_in": "norms with residual and LN (2021)",
    "globenc": "GlobEnc",
    "alti": "ALTI",
}
WORDS = "“the superiority of our context mixing score over other analysis methods”"
DRAWS = 2000
Dropped = Sequence[tuple[str, str]]


def cue_claim(rival: str) -> Claim:
    """Returns that Value Zeroing is nearer to known cues than a rival."""
    return Claim(
        f"nearer to cues than {RIVALS[rival]}",
        WORDS,
        "abstract",
        f"alignment with the cue (dot) less that of {RIVALS[rival]}, each at its best layer",
    )


def faithful_claim(rival: str, identity: str) -> Claim:
    """Returns that Value Zeroing is more faithful than a rival."""
    return Claim(
        f"more faithful than {RIVALS[rival]}, {identity}",
        WORDS,
        "abstract",
        f"blank-out rank correlation of the rollout {identity} less that of {RIVALS[rival]}",
    )


PROBING = Claim(
    "the curve follows probing",
    WORDS + ", among others by probing",
    "abstract",
    "rank correlation over layers of cue alignment and of the label's compression (MDL)",
)


def sets_of(options: Any, count: int, **how: Any) -> dict[str, list[MinimalPair]]:
    """Returns about so many minimal pairs by set, with cues where they are known."""
    if not options.data:
        return {"agreement": [*demo_pairs(count=count, **how)]}
    files = options.data.split(",")
    known = {Path(file).stem: map(expanded, with_cues(file)) for file in files}
    share = -(-count // len(files))
    return {
        name: [*{pair.good: pair for pair in some}.values()][:share] for name, some in known.items()
    }


def with_cues(file: str) -> tuple[MinimalPair, ...]:
    """Returns the pairs of a file, with derived cues if its set has a rule for them."""
    try:
        return load_minimal_pairs(file, cues="derived")
    except FileFormatError:
        return load_minimal_pairs(file)


def expanded(pair: MinimalPair) -> MinimalPair:
    """Returns a pair without contractions, so that a verb is one word."""

    def places(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple((len(full(pair.good[:a])), len(full(pair.good[:b]))) for a, b in spans)

    return MinimalPair(full(pair.good), full(pair.bad), places(pair.cues), places(pair.lures))


def full(text: str) -> str:
    """Returns a text without contractions of "not"."""
    text = text.replace("won't", "will not").replace("can't", "cannot")
    return re.sub(r"(\w)n't\b", r"\1 not", text)


def is_singular(pair: MinimalPair) -> bool:
    """Returns whether the right word is singular, the wrong one being the plural, or vice versa."""
    plurals = {"themselves", "these", "those"} & {pair.answer, pair.wrong}
    if plurals:
        return pair.answer not in plurals
    # Verbs: has, not have; kisses, not kiss.
    ends = (pair.answer.endswith("s"), pair.wrong.endswith("s"))
    return len(pair.answer) > len(pair.wrong) if all(ends) else ends[0]


def balanced(pairs: list[MinimalPair]) -> list[MinimalPair]:
    """Returns as many singular as plural pairs, the first ones."""
    kinds = [[pair for pair in pairs if is_singular(pair) == kind] for kind in (True, False)]
    least = min(map(len, kinds))
    return [pair for some in kinds for pair in some[:least]]


def compare(model: Any, pairs: list[MinimalPair]) -> tuple[ScoreTable, Dropped]:
    """Returns all methods' figures, and what was left out.

    A model without a head predicts nothing that a map could be faithful to: of it there is cue
    alignment alone.
    """
    methods = ["value_zeroing", *RIVALS]
    view = as_view(model)
    if not view.readout.refusal:
        compared = cm.compare(model, pairs, methods=methods, unusable="drop")
        return compared, compared.dropped
    known, dropped = sentences_of(model, view, pairs, None, "drop", answer=Answer())
    places, cues = [one.place for one in known], [[*one.cues] for one in known]
    rows: list[ScoreRow] = []
    for name in methods:
        maps = [comparable()[name](model, one) for one in known]
        maps = [(one.mean("head") if len(one.heads) > 1 else one).normalize() for one in maps]
        rows += cue_alignment(maps, cues, pos=places, method=name).rows
    text = "Of a model without a head, whose maps cannot be held against a prediction."
    return Score(rows=tuple(rows), title="Cue alignment", caption=text), dropped


def by_set(compared: ScoreTable, dropped: Dropped, sets: dict[str, list[MinimalPair]]) -> Any:
    """Returns cue alignment by set, method and layer."""
    left_out = {text for text, _ in dropped}
    names = [name for name, some in sets.items() for pair in some if pair.good not in left_out]
    rows = []
    for row in compared.rows:
        if row.metric in ALIGNMENT:
            means = pandas.Series(row.values, dtype=float).groupby(names).agg(["mean", "count"])
            about = {"method": row.method, "layer": row.layer, "metric": row.metric}
            rows += [{"set": name, **about, **one} for name, one in means.to_dict("index").items()]
    return pandas.DataFrame(rows)


def rollouts(found: Any) -> dict[str, tuple[str, str]]:
    """Returns the layer names of rollouts of Value Zeroing and of rivals, by what they add."""
    last = max(int(row.layer) for row in found.rows if row.layer.isdigit())
    plain, added = f"input to {last}", f"input to {last}, with identity"
    return {"without identity": (plain, plain), "with identity": (added, plain)}


def score(found: Reproduction, name: str, compared: Any) -> None:
    """Scores cue alignment and faithfulness against every rival."""
    for rival in RIVALS:
        if rival not in compared.methods:
            continue
        if "dot" in compared.metrics:
            row = compared.difference("value_zeroing", rival, metric="dot", layer="best").rows[0]
            scored(found, cue_claim(rival), name, row)
        for identity, layers in (
            rollouts(compared).items() if "blank-out" in compared.metrics else ()
        ):
            row = compared.difference("value_zeroing", rival, metric="blank-out", layer=layers)
            scored(found, faithful_claim(rival, identity), name, row.rows[0])


def scored(found: Reproduction, claim: Claim, name: str, row: Any) -> None:
    """Scores a claim by a paired difference."""
    values = torch.zeros(row.sentences)
    found.score(claim, name, values, interval=(row.value, row.low, row.high))


def follow(found: Reproduction, name: str, probing: Any, compared: Any) -> None:
    """Scores how the curve over layers follows the probe's.

    The interval reaches as far as 95 % of all orders of the layers correlate by chance: with four
    layers, nothing can be said.
    """
    rows = [r for r in compared.rows if (r.method, r.metric) == ("value_zeroing", "dot")]
    curve = torch.tensor([row.value for row in rows if row.layer.isdigit()])
    compression = probing.compression.mean(0)[0].to(curve)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(len(curve), generator=generator) for _ in range(DRAWS)]
    chance = torch.stack([spearman(curve[some], compression) for some in drawn]).abs()
    wide, value = float(chance.quantile(0.95)), float(spearman(curve, compression))
    ends = max(-1.0, value - wide), min(1.0, value + wide)
    found.score(PROBING, name, curve, interval=(value, *ends))


def probe(found: Reproduction, name: str, model: Any, options: Any, compared: Any) -> None:
    """Probes for the number of the word that is asked for, beside the maps."""
    sets = sets_of(options, options.texts, seed=11)
    known = balanced([pair for some in sets.values() for pair in some])
    if not known:
        return
    mask = getattr(model.tokenizer, "mask_token", None)
    texts = [pair.masked(mask) if mask else pair.prefix for pair in known]
    probing = cm.probe(model, texts, [*map(is_singular, known)], seeds=options.seeds)
    follow(found, name, probing, compared)
    found.show(f"{name}: maps beside probes", "By layer.", probing.beside(compared))
    found.table(f"{name}: probing", "By layer.", probing.curves().to_dataframe())


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=60,
        model="masked-lm,causal-lm",
        texts={"type": int, "default": 400, "help": "texts that probes are trained on"},
        seeds={"type": int, "default": 5, "help": "seeds of the probes"},
    )
    found = Reproduction("value_zeroing", "mohebbi2023quantifying", options)
    for name, model in load(options.model).items():
        sets = sets_of(options, options.limit)
        pairs = [pair for some in sets.values() for pair in some]
        compared, dropped = compare(model, pairs)
        score(found, name, compared)
        found.show(f"{name}: every method", "Cue alignment and faithfulness.", compared)
        frame = compared.to_dataframe()
        kept = ["method", "layer", "metric", "value", "low", "high", "chance", "sentences"]
        found.table(f"{name}: every figure", "By method, layer and metric.", frame[kept])
        if "dot" not in compared.metrics:
            continue
        if len(sets) > 1:
            found.table(f"{name}: by set", "Cue alignment.", by_set(compared, dropped, sets))
        probe(found, name, model, options, compared)
    return found.write()


if __name__ == "__main__":
    main()
