"""Mohebbi, Zuidema, Chrupała, Alishahi: Quantifying Context Mixing (EACL 2023), Value Zeroing.

    python reproductions/value_zeroing.py
    python reproductions/value_zeroing.py --model bert-base-uncased --data FILE.jsonl

--data: a file of BLiMP (https://github.com/alexwarstadt/blimp, data/*.jsonl). Cues of the paper's
five sets are derived from their sentences; a file of yours may name them in a field "cues".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from claims import Claim, Reproduction, load, read_options

import tl_contextmix as cm
from tl_contextmix.core.statistics import spearman
from tl_contextmix.evaluation import MinimalPair, demo_pairs, load_minimal_pairs

RIVALS = {
    "attention": "attention weights",
    "attention_norms attn_out": "norms (2020)",
    "attention_norms mlp_in": "norms with residual and LN (2021)",
    "globenc": "GlobEnc",
    "alti": "ALTI",
}
WORDS = "“the superiority of our context mixing score over other analysis methods”"
DRAWS = 2000


def cue_claim(rival: str) -> Claim:
    """Returns that Value Zeroing is nearer to known cues than a rival."""
    return Claim(
        f"nearer to cues than {RIVALS[rival]}",
        WORDS,
        "abstract; section 5",
        f"alignment with the cue (dot) less that of {RIVALS[rival]}, each at its best layer",
    )


def faithful_claim(rival: str, identity: str) -> Claim:
    """Returns that Value Zeroing is more faithful than a rival."""
    return Claim(
        f"more faithful than {RIVALS[rival]}, {identity}",
        WORDS,
        "abstract; section 7",
        f"blank-out rank correlation of the rollout {identity} less that of {RIVALS[rival]}",
    )


PROBING = Claim(
    "the curve follows probing",
    WORDS + ", among others by probing",
    "abstract; section 6",
    "rank correlation over layers of cue alignment and of the label's compression (MDL)",
)


def pairs_of(options: Any, name: str) -> tuple[MinimalPair, ...]:
    """Returns minimal pairs with cues."""
    if not options.data:
        return demo_pairs(count=options.limit)
    pairs = load_minimal_pairs(options.data, cues="derived")
    return pairs[: options.limit]


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
        for identity, layers in rollouts(compared).items():
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
        pairs = pairs_of(options, name)
        methods = ["value_zeroing", *RIVALS]
        compared = cm.compare(model, pairs, methods=methods, unusable="drop")
        score(found, name, compared)
        found.show(f"{name}: every method", "Figures 2 to 4.", compared)
        frame = compared.to_dataframe()
        kept = ["method", "layer", "metric", "value", "low", "high", "chance", "sentences"]
        found.table(f"{name}: every figure", "By method, layer and metric.", frame[kept])
        if "dot" not in compared.metrics:
            continue
        known = pairs if options.data else demo_pairs(count=options.texts, seed=11)
        mask = getattr(model.tokenizer, "mask_token", None)
        texts = [pair.masked(mask) if mask else pair.prefix for pair in known]
        number = [pair.answer.endswith("s") for pair in known]
        if len({*number}) < 2:
            continue
        probing = cm.probe(model, texts, number, seeds=options.seeds)
        follow(found, name, probing, compared)
        beside = probing.beside(compared)
        found.show(f"{name}: maps beside probes", "Section 6.", beside)
        found.table(f"{name}: probing", "By layer.", probing.curves().to_dataframe())
    return found.write()


if __name__ == "__main__":
    main()
