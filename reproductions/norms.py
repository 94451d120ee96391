"""Kobayashi, Kuribayashi, Yokoi, Inui: norms of attention (EMNLP 2020 and EMNLP 2021).

    python reproductions/norms.py
    python reproductions/norms.py --model bert-base-uncased --data sentences.txt

--data: a sentence per line. The papers have Wikipedia excerpts for BERT, published with
https://github.com/gorokoba560/norm-analysis-of-transformer, and the German-English alignments of
https://www-i6.informatik.rwth-aachen.de/goldAlignment/ for a translator of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, load, read_options, sentences
from grammar_fr import Translation, TranslationGrammar

import tl_contextmix as cm
from tl_contextmix.core.words import is_mark
from tl_contextmix.evaluation import alignment_error_rate, expansion_rates, frequency_correlation
from tl_contextmix.results import ContextMap

SPECIAL = Claim(
    "poor attention to special tokens",
    "“contrary to previous studies, BERT pays poor attention to special tokens”",
    "2020, abstract; section 4",
    "share of special tokens in attention weights less their share in norms",
)
ALIGNED = Claim(
    "norms align words better than weights",
    "“reasonable word alignment can be extracted from attention mechanisms of Transformer”",
    "2020, abstract; section 5",
    "alignment error rate of weights less that of norms, per sentence, each in its best layer",
)
REASONABLE = Claim(
    "norms give a reasonable alignment",
    "“reasonable word alignment can be extracted from attention mechanisms of Transformer”",
    "2020, abstract; section 5",
    "0.5 less the alignment error rate of norms, per sentence, in the best layer",
)
LESS = Claim(
    "less impact than previously assumed",
    "“the token-to-token interaction performed via attention has less impact on the intermediate "
    "representations than previously assumed”",
    "2021, abstract; section 4",
    "mixing ratio of attention alone less that of the whole attention block",
)
PRESERVED = Claim(
    "blocks preserve more than they mix",
    "“the token-to-token interaction performed via attention has less impact on the intermediate "
    "representations than previously assumed”",
    "2021, abstract; section 4",
    "0.5 less the mixing ratio of the whole attention block",
)


def on_special(map: ContextMap) -> torch.Tensor:
    """Returns the share of special tokens in the rows of others, per sentence."""
    special = torch.tensor([[is_mark(word) for word in row] for row in map.source.strings])
    shares = map.normalize().mean("head").scores[:, :, 0] * special[:, None, None]
    rows = (map.target.mask & ~special)[:, None]
    return (shares.sum(-1) * rows).sum((1, 2)) / rows.sum((1, 2)) / shares.shape[1]


def mixing(found: Reproduction, name: str, model: Any, texts: list[str]) -> None:
    """Scores how much attention mixes, and whether rare words are mixed more."""
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
    found.show(f"{name}: mixing ratio and word frequency (2021)", "", curve)
    found.table(f"{name}: mixing ratio and frequency rank", "By layer.", curve.to_dataframe())
    rates = expansion_rates(model)
    found.show(f"{name}: what value and output matrices expand", "Weights alone.", rates)


def special(found: Reproduction, name: str, model: Any, texts: list[str]) -> None:
    """Scores the attention to special tokens."""
    apart = []
    for start in range(0, len(texts), 16):
        some = texts[start : start + 16]
        weights = cm.attention(model, some)
        norms = cm.attention_norms(model, some, at="attn_out", heads=True)
        apart.append(on_special(weights) - on_special(norms))
    found.score(SPECIAL, name, torch.cat(apart))


def links(pair: Translation, map: ContextMap, row: int, ahead: int) -> list[tuple[int, int]]:
    """Returns the gold links of a translation, as places of the words of a map.

    Args:
        pair: The translation.
        map: The map, by words.
        row: Its sentence.
        ahead: 0 where the row of a word is the one that has read it, 1 the one that predicts it.
    """
    target, source = (
        [at for at, word in enumerate(words) if map_mask[at] and not is_mark(word)]
        for words, map_mask in (
            (map.target.strings[row], map.target.mask[row].tolist()),
            (map.source.strings[row], map.source.mask[row].tolist()),
        )
    )
    if len(target) != len(pair.french) or len(source) != len(pair.english):
        return []  # the tokenizer's words are not the grammar's
    given = enumerate(pair.sources)
    return [(target[t - ahead], source[s[0]]) for t, s in given if s and t >= ahead]


def aligned(found: Reproduction, count: int) -> None:
    """Scores alignments of the embedded translator, by the word read and the word predicted."""
    model, name = cm.load_demo("encoder-decoder"), "encoder-decoder"
    pairs = TranslationGrammar(7, "test").translations(count)
    english, french = ([getattr(p, s) for p in pairs] for s in ("source_text", "target_text"))
    asked = {"decoder_input": french, "stack": "cross"}
    maps = {
        "weights": cm.attention(model, english, heads=False, **asked).words(),
        "norms": cm.attention_norms(model, english, at="attn_out", **asked).words(),
    }
    each, curves = {}, []
    for method, map in maps.items():
        tried = []
        for ahead, setting in enumerate(("word read", "word predicted")):
            gold = [links(pair, map, row, ahead) for row, pair in enumerate(pairs)]
            curve = alignment_error_rate(map, gold)
            curves.append(curve.to_dataframe().assign(map=method, setting=setting))
            tried += [(point.value, point.layer, gold) for point in curve.points]
        _, layer, gold = min(tried, key=lambda one: one[:2])
        each[method] = [
            alignment_error_rate(map.select(batch=row, layer=layer), [gold[row]]).points[0].value
            for row in range(count)
        ]
    text = "Of the strongest source of each French word; lower is better."
    found.table(f"{name}: alignment error rate (2020)", text, pandas.concat(curves))
    apart = [w - n for w, n in zip(each["weights"], each["norms"], strict=True)]
    found.score(ALIGNED, name, apart)
    found.score(REASONABLE, name, [0.5 - value for value in each["norms"]])


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(__doc__, given, limit=60, model="minilm,masked-lm")
    found = Reproduction("norms", "kobayashi2020attention", options)
    for name, model in load(options.model).items():
        texts = sentences(options, name)
        special(found, name, model, texts)
        mixing(found, name, model, texts)
    aligned(found, options.limit)
    return found.write()


if __name__ == "__main__":
    main()
