"""Kobayashi, Kuribayashi, Yokoi, Inui: norms of attention (EMNLP 2020 and EMNLP 2021).

    python reproductions/norms.py
    python reproductions/norms.py --model bert-base-uncased --data sentences.txt
    python reproductions/norms.py --translator NAME --bitext test.de,test.en,alignment.talp

--data: a sentence per line, or the rows of a JSON, JSON lines, CSV or TSV file with text, sentence,
words or tokens. The papers have Wikipedia, in the segments of Clark et al. 2019, which
preprocess_unlabeled.py of https://github.com/clarkkev/attention-analysis writes as JSON (the file
that is published with it, unlabeled_attn.pkl, is a pickle and not read).
--bitext: source sentences, target sentences, of words with blanks between them, and links, a line
each: 1-1 2p3, word of the source and of the target from 1, with a p where the link is possible
only. The paper has https://www-i6.informatik.rwth-aachen.de/goldAlignment/ and translators of its
own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, load, read_options, segmented, sentences
from grammar_fr import TranslationGrammar

import tl_contextmix as cm
from tl_contextmix.core.words import is_mark
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation import alignment_error_rate, expansion_rates, frequency_correlation
from tl_contextmix.results import ContextMap

SPECIAL = Claim(
    "poor attention to special tokens",
    "“contrary to previous studies, BERT pays poor attention to special tokens”",
    "2020, abstract and section 4",
    "share of special tokens in attention weights less their share in norms",
)
ALIGNED = Claim(
    "norms align words better than weights",
    "“reasonable word alignment can be extracted from attention mechanisms of Transformer”",
    "2020, abstract and section 5",
    "alignment error rate of weights less that of norms, per sentence, each in its best layer",
)
REASONABLE = Claim(
    "norms give a reasonable alignment",
    "“reasonable word alignment can be extracted from attention mechanisms of Transformer”",
    "2020, abstract and section 5",
    "0.5 less the alignment error rate of norms, per sentence, in the best layer",
)
LESS = Claim(
    "less impact than previously assumed",
    "“the token-to-token interaction performed via attention has less impact on the intermediate "
    "representations than previously assumed”",
    "2021, abstract and section 4.2, table 2",
    "mixing ratio of attention alone less that of the whole attention block",
)
PRESERVED = Claim(
    "blocks preserve more than they mix",
    "“the token-to-token interaction performed via attention has less impact on the intermediate "
    "representations than previously assumed”",
    "2021, abstract and section 4.2, table 2",
    "0.5 less the mixing ratio of the whole attention block",
)


def on_special(map: ContextMap) -> torch.Tensor:
    """Returns the share of special tokens in the rows of others, per sentence."""
    special = torch.tensor([[is_mark(word) for word in row] for row in map.source.strings])
    shares = map.normalize().mean("head").scores[:, :, 0] * special[:, None, None]
    rows = (map.target.mask & ~special)[:, None]
    return (shares.sum(-1) * rows).sum((1, 2)) / rows.sum((1, 2)) / shares.shape[1]


def mixing(found: Reproduction, name: str, model: Any, texts: list[Any]) -> None:
    """Scores how much attention mixes, and shows how that goes with word frequency."""
    # Masked models end the attention block with a norm, causal ones do not.
    end = "mlp_in" if getattr(model.tokenizer, "mask_token", None) else "resid_mid"
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(texts), 16):
        for at in ("attn_out", "resid_mid", end):
            ratios = cm.mixing_ratio(model, texts[start : start + 16], at=at)
            real = ratios.tokens.mask[:, None]
            mean = (ratios.values * real).sum((1, 2)) / real.sum((1, 2)) / len(ratios.layers)
            parts.setdefault(at, []).append(mean)
    means = {at: torch.cat(some) for at, some in parts.items()}
    found.score(LESS, name, means["attn_out"] - means[end])
    found.score(PRESERVED, name, 0.5 - means[end])
    whole = cm.mixing_ratio(model, texts, at=end)
    counts = Counter(whole.tokens.ids[whole.tokens.mask].tolist())
    curve = frequency_correlation(whole, counts)
    found.show(f"{name}: mixing ratio and word frequency (2021, section 5.2)", "", curve)
    found.table(f"{name}: mixing ratio and frequency rank", "By layer.", curve.to_dataframe())
    rates = expansion_rates(model)
    found.show(
        f"{name}: what value and output matrices expand (2021, section 4.4)",
        "Weights alone.",
        rates,
    )


def special(found: Reproduction, name: str, model: Any, texts: list[Any]) -> None:
    """Scores the attention to special tokens."""
    apart = []
    for start in range(0, len(texts), 16):
        some = texts[start : start + 16]
        weights = cm.attention(model, some)
        norms = cm.attention_norms(model, some, at="attn_out", heads=True)
        apart.append(on_special(weights) - on_special(norms))
    found.score(SPECIAL, name, torch.cat(apart))


@dataclass(frozen=True)
class Bitext:
    """Sentences, their translations and which words of them are linked.

    Attributes:
        source: Sentences, with blanks between words.
        target: Their translations.
        sure: For each the links, as places of a target word and of a source word.
        possible: Likewise those that are possible, sure ones among them.
    """

    source: list[str]
    target: list[str]
    sure: list[list[tuple[int, int]]]
    possible: list[list[tuple[int, int]]]


def built_in(count: int) -> Bitext:
    """Returns translations of the grammar of the embedded translator."""
    pairs = TranslationGrammar(7, "test").translations(count)
    links = [[(t, s[0]) for t, s in enumerate(pair.sources) if s] for pair in pairs]
    return Bitext([p.source_text for p in pairs], [p.target_text for p in pairs], links, links)


def read_bitext(files: str, count: int) -> Bitext:
    """Returns translations from files of sentences, of translations and of links."""
    source, target, gold = (
        Path(file).read_text(encoding="utf-8").splitlines()[:count] for file in files.split(",")
    )
    every = [
        [(*map(int, re.split("[-p]", one)), "p" in one) for one in row.split()] for row in gold
    ]
    sure, possible = (
        [[(t - 1, s - 1) for s, t, unsure in row if kept or not unsure] for row in every]
        for kept in (False, True)
    )
    return Bitext(source, target, sure, possible)


def word_places(map: ContextMap, row: int) -> tuple[list[int], list[int]]:
    """Returns where the words of a sentence are among targets and among sources."""
    target, source = (
        [
            at
            for at, real in enumerate(side.mask[row])
            if real and not is_mark(side.strings[row][at])
        ]
        for side in (map.target, map.source)
    )
    return target, source


def links(map: ContextMap, row: int, pairs: list[tuple[int, int]], ahead: int) -> Any:
    """Returns the links of a sentence as places of a map of words.

    Args:
        map: The map.
        row: The sentence.
        pairs: The links, as words of target and source.
        ahead: 0 where the row of a word is the one that has read it, 1 the one that predicts it.
    """
    target, source = word_places(map, row)
    return [(target[t - ahead], source[s]) for t, s in pairs if t >= ahead]


def aligned(found: Reproduction, name: str, model: Any, bitext: Bitext) -> None:
    """Scores alignments of a translator, by the word read and the word predicted."""
    asked = {"decoder_input": bitext.target, "stack": "cross"}
    maps = {
        "weights": cm.attention(model, bitext.source, heads=False, **asked).words(),
        "norms": cm.attention_norms(model, bitext.source, at="attn_out", **asked).words(),
    }
    # Where the tokenizer's words are others, links say nothing.
    kept = [
        row
        for row, texts in enumerate(zip(bitext.target, bitext.source, strict=True))
        if [*map(len, word_places(maps["norms"], row))] == [len(text.split()) for text in texts]
    ]
    if not kept:
        raise InvalidInput(
            "no sentence can be aligned",
            "words that the tokenizer cuts otherwise, in all of them",
            "blanks between words, and around punctuation",
            "Cut the words of both files as the tokenizer does.",
        )
    each, curves = {}, []
    for method, one in maps.items():
        tried = []
        for ahead, setting in enumerate(("word read", "word predicted")):
            gold = [
                [links(one, row, some[row], ahead) for row in kept]
                for some in (bitext.sure, bitext.possible)
            ]
            curve = alignment_error_rate(one.select(batch=kept), *gold)
            curves.append(curve.to_dataframe().assign(map=method, setting=setting))
            tried += [(point.value, point.layer, gold) for point in curve.points]
        _, layer, gold = min(tried, key=lambda tried: tried[:2])
        each[method] = [
            alignment_error_rate(one.select(batch=row, layer=layer), [sure], [possible])
            .points[0]
            .value
            for row, sure, possible in zip(kept, *gold, strict=True)
        ]
    text = (
        "Of the strongest source of each target word; lower is better. Of "
        f"{len(bitext.source)} sentences, {len(kept)} have the tokenizer's words."
    )
    found.table(f"{name}: alignment error rate (2020)", text, pandas.concat(curves))
    apart = [w - n for w, n in zip(each["weights"], each["norms"], strict=True)]
    found.score(ALIGNED, name, apart)
    found.score(REASONABLE, name, [0.5 - value for value in each["norms"]])


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__,
        given,
        limit=60,
        model="minilm,masked-lm",
        translator={"default": "encoder-decoder", "help": "a translator (default: %(default)s)"},
        bitext="source sentences, target sentences and links: three files, with commas",
    )
    found = Reproduction("norms", "kobayashi2020attention", options)
    for name, model in load(options.model).items():
        texts = segmented(sentences(options, name))
        special(found, name, model, texts)
        mixing(found, name, model, texts)
    for name, model in load(options.translator).items():
        if options.bitext:
            aligned(found, name, model, read_bitext(options.bitext, options.limit))
        elif name == "encoder-decoder":
            aligned(found, name, model, built_in(options.limit))
    return found.write()


if __name__ == "__main__":
    main()
