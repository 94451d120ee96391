"""Geva, Schuster, Berant, Levy: Feed-Forward Layers Are Key-Value Memories (EMNLP 2021).

    python reproductions/feed_forward_memories.py
    python reproductions/feed_forward_memories.py --model gpt2 --data wiki.train.tokens

--data: a document per line, or rows with text; a document is cut after " . " into sentences, and
headings (" = Title = ") are left out, as WikiText-103 has them (https://huggingface.co/datasets/
Salesforce/wikitext; the files of the archive are wiki.train.tokens and the like). The paper's
model is fairseq's (Baevski & Auli 2019), which TransformerLens does not read.
--sheet: where to write the annotators' sheet; --annotated: sheets that were filled in, with commas.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, apart, load, read_options, sentences

import tl_contextmix as cm
from tl_contextmix.evaluation import read_annotations

SHALLOW = Claim(
    "lower layers are shallower",
    "“lower layers tend to capture shallow patterns, while upper layers learn more semantic ones”",
    "abstract; section 3.2, figure 2",
    "share of a memory's triggers with the same ending, lower half of the layers less upper half",
)
LAST = Claim(
    "the last token matters more than the first",
    "removing the last token has more impact than removing the first",
    "section 3.2, figure 3",
    "relative change of coefficients without the first token less that without the last",
)
UPPER = Claim(
    "upper values agree with what follows",
    "“inducing output distributions that concentrate probability mass on tokens likely to appear "
    "immediately after each pattern, particularly in the upper layers”",
    "abstract; section 4, figure 4",
    "rate at which a value's top token follows its first trigger, upper half less lower half",
)
CHANCE = Claim(
    "upper values agree more than by chance",
    "the agreement rate rises above that of a random baseline",
    "section 4, figure 4",
    "the same rate in the upper half, less that of next tokens dealt out at random",
)
COMPOSITION = Claim(
    "a layer's output is a composition",
    "“the output of a feed-forward layer is a composition of its memories”",
    "abstract; section 5.1, figure 8",
    "share of positions where no active memory promotes the top token of the layer's output",
    0.5,
)
REFINED = Claim(
    "residual connections refine the prediction",
    "“subsequently refined throughout the model's layers via residual connections”",
    "abstract; section 5.2, figure 9",
    "share of positions where the residual stream's top token is the final one, last layer less "
    "first",
)


def halves(layer: torch.Tensor) -> torch.Tensor:
    """Returns which entries are of the upper half of the layers."""
    return 2 * layer > layer.max()


def triggers_say(found: Reproduction, name: str, triggers: Any, seeds: int) -> None:
    """Scores what triggers have in common, and what becomes of them without a token."""
    patterns = triggers.patterns().to_dataframe()
    ends = patterns[patterns.kind == "ends with"]
    share, upper = torch.tensor([*ends.share]), halves(torch.tensor([*ends.layer]))
    found.score(SHALLOW, name, share, interval=apart(share[~upper], share[upper]))
    table = patterns.groupby(["layer", "kind"])[["share", "chance", "length"]].mean().reset_index()
    found.table(f"{name}: what triggers share (figure 2)", "Means over memories.", table)
    draws = [triggers.removal(per_layer=5, k=10, seed=seed) for seed in range(seeds)]
    first, last = (
        torch.stack([d.select(quantity=q).values for d in draws]).mean(dim=(1, 2, 3))
        for q in ("first", "last")
    )
    found.score(LAST, name, first - last)
    found.show(f"{name}: without a token (figure 3)", "Of five memories per layer.", draws[0])


def values_say(found: Reproduction, name: str, triggers: Any) -> None:
    """Scores whether values promote what follows."""
    agreement = triggers.agreement()
    upper, agree = halves(agreement.layer), agreement.agree.double()
    found.score(UPPER, name, agree, interval=apart(agree[upper], agree[~upper]))
    rates = agreement.by_layer()
    chance = dict(zip(rates.layer, rates.chance, strict=True))
    dealt = torch.tensor([chance[layer] for layer in agreement.layer.tolist()])
    found.score(CHANCE, name, (agree - dealt)[upper])
    found.table(f"{name}: agreement (figures 4 and 5)", "Rates and ranks.", rates)
    found.table(f"{name}: by probability (figure 6)", "Equal groups.", agreement.by_max_prob())
    best = agreement.to_dataframe().query("agree").nlargest(10, "max_prob")
    found.table(f"{name}: values that agree (table 2)", "Those with the highest probability.", best)


def layers_say(found: Reproduction, name: str, model: Any, texts: list[str]) -> None:
    """Scores whether layers compose, and what of."""
    zero, rises, agreeing = [], [], []
    common = [w for w, _ in Counter(" ".join(texts).split()).most_common(10)]
    for start in range(0, len(texts), 16):
        memories = cm.ff_memories(model, texts[start : start + 16])
        real = memories.tokens.mask
        rates = [
            one.double().masked_fill(~real[:, None], 0).sum(-1) / real.sum(-1)[:, None]
            for one in (memories.zero_agreement, memories.residual_is_final)
        ]
        zero.append(rates[0].mean(1))
        rises.append(rates[1][:, -1] - rates[1][:, 0])
        agreeing.append(memories.agreements(stop_words=common).to_dataframe())
    found.score(COMPOSITION, name, torch.cat(zero))
    found.score(REFINED, name, torch.cat(rises))
    composed = cm.composition(model, texts)
    found.show(f"{name}: composition (figures 7 to 11)", "Over a position of each text.", composed)
    found.table(f"{name}: composition", "By layer.", composed.to_dataframe())
    cases = pandas.concat(agreeing).groupby(["layer", "quantity"]).value.mean().unstack()
    found.table(
        f"{name}: where a memory agrees with its layer (section 5.1)",
        "Stop words: the ten most frequent words. Short: fewer than five tokens.",
        cases.reset_index(),
    )


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=600,
        model="causal-lm",
        sheet="file for a sheet to annotate",
        annotated="annotated sheets, with commas",
        draws={"type": int, "default": 10, "help": "draws of memories without a token"},
    )
    found = Reproduction("feed_forward_memories", "geva2021transformer", options)
    for name, model in load(options.model).items():
        documents = [one for one in sentences(options, name) if not one.startswith("= ")]
        cut = [text for one in documents for text in re.split(r"(?<= [.?!]) ", one)]
        texts = list(dict.fromkeys(cut))
        with tempfile.TemporaryDirectory() as folder:
            triggers = cm.mine_triggers(model, texts, out=folder)
            assert triggers is not None  # nothing was left to other processes
            triggers_say(found, name, triggers, options.draws)
            values_say(found, name, triggers)
            if options.sheet:
                triggers.to_sheet(options.sheet)
        layers_say(found, name, model, texts[:100])
    if options.annotated:
        shares = read_annotations(*options.annotated.split(","))
        found.show("Annotated patterns (figure 2)", "", shares)
        found.table("Annotated patterns", "By layer.", shares.to_dataframe())
    return found.write()


if __name__ == "__main__":
    main()
