"""Kobayashi, Kuribayashi, Yokoi, Inui: Analyzing Feed-Forward Blocks (ICLR 2024).

    python reproductions/feed_forward_maps.py
    python reproductions/feed_forward_maps.py --model bert-base-uncased --data sentences.txt

--data: a sentence per line, or the rows of a JSON, JSON lines, CSV or TSV file with text, sentence,
words or tokens. The paper has SST-2 (GLUE's dev.tsv) and Wikipedia: the segments of Clark et al.
2019, which preprocess_unlabeled.py of https://github.com/clarkkev/attention-analysis writes as JSON
(the file that is published with it, unlabeled_attn.pkl, is a pickle and not read).
--tags: JSON lines, for each sentence a list with a label for each of its words (parts of speech).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from claims import Claim, Reproduction, load, read_options, segmented, sentences

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.core.statistics import spearman
from tl_contextmix.evaluation import by_kind, over_corpus
from tl_contextmix.results import LayerCurves

POINTS = ("resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out")
WORDS = (
    "“FF networks modify the input contextualization to emphasize specific types of linguistic "
    "compositions”"
)
PIECES = Claim(
    "FF amplifies the pieces of a word",
    WORDS,
    "abstract; section 5.2, table 1",
    "change that FF makes to a row's share, pieces of one word less unrelated tokens, lower "
    "half of the layers",
)
NEIGHBOURS = Claim(
    "FF amplifies neighbouring words",
    WORDS,
    "abstract; section 5.2, table 1",
    "change that FF makes to a row's share, next words less unrelated tokens, lower half "
    "of the layers",
)
CANCEL = Claim(
    "FF and its surroundings cancel",
    "“FF and its surrounding components tend to cancel out each other's effects”",
    "abstract",
    "-cos(change by FF, change by what follows), mean over layers; 0.5 is that of unrelated maps",
    0.5,
)


def changes(model: Any, texts: list[str]) -> Any:
    """Returns how much FF, RES and LN change the maps of some texts."""
    return cm.contextualization_change(cm.attention_norms(model, segmented(texts), at=POINTS))


def undone(model: Any, texts: list[str]) -> Any:
    """Returns how far what follows FF undoes its changes."""
    return cm.cancellation(cm.attention_norms(model, segmented(texts), at=POINTS))


def amplified(model: Any, texts: list[str], tags: dict[str, list[str]] | None = None) -> Any:
    """Returns the change that FF makes to shares, by kind of pair."""
    maps = cm.attention_norms(model, segmented(texts), at=["mlp_in", "mlp_out"])
    labels = {"texts": texts, "labels": [tags[text] for text in texts]} if tags else {}
    return by_kind(maps["mlp_out"].normalize() - maps["mlp_in"].normalize(), **labels)


def pairs(model: Any, texts: list[str]) -> Any:
    """Returns the pairs of different words that FF amplifies most in each text."""
    maps = cm.attention_norms(model, segmented(texts), at=["mlp_in", "mlp_out"])
    frame = cm.amplified_pairs(maps["mlp_in"], maps["mlp_out"], k=10).to_dataframe()
    frame = frame[(frame.direction == "amplified") & (frame.source_token != frame.target_token)]
    return frame.assign(pair=frame.source_token + " -> " + frame.target_token)


def most_frequent(found: LayerCurves, k: int = 5) -> Any:
    """Returns the pairs that are amplified in most texts, by layer."""
    frame = found.to_dataframe().rename(columns={"category": "pair", "value": "change"})
    frame = frame.sort_values(["layer", "sentences", "change"], ascending=[True, False, False])
    return frame.groupby("layer").head(k)[["layer", "pair", "sentences", "change"]]


def without_outliers(model: Any, texts: list[str], dims: int = 2) -> Any:
    """Returns how much of the map after FF is of its two largest dimensions, by layer.

    With the gain that the norm after FF has there, over its mean, in post-LN models.
    """
    rows, blocks = [], as_view(model).blocks()
    for row, text in enumerate(texts):
        parts = cm.decompose(model, segmented([text]), at="mlp_out")
        whole = parts.norms().scores[0, :, 0]
        largest = parts.parts[0].square().sum((1, 2)).topk(dims).indices.tolist()
        for layer, some in enumerate(largest):
            rest = parts.norms(without=some).scores[0, layer, 0]
            real = whole[layer] != 0
            figures = {
                "share of squares": 1 - float(rest.square().sum() / whole[layer].square().sum()),
                "1 - rank correlation": 1 - float(spearman(whole[layer][real], rest[real])),
            }
            block = blocks[layer].feed_forward
            norm = None if block is None else block.norm_after
            if norm is not None and norm.weight is not None:
                gain = norm.weight.abs()
                figures["gain there / mean gain"] = float(gain[some].mean() / gain.mean())
            rows += [
                {"batch": row, "layer": layer, "quantity": name, "value": value}
                for name, value in figures.items()
            ]
    return pandas.DataFrame(rows)


def score(found: Reproduction, name: str, model: Any, texts: list[str]) -> None:
    """Scores the paper's claims on one model."""
    kinds, cancels = [], []
    for start in range(0, len(texts), 16):
        some = texts[start : start + 16]
        kinds.append(amplified(model, some).to_dataframe())
        cancels.append(undone(model, some).select(quantity="cancel").values[..., 0].mean(1))
    for claim, kind in ((PIECES, "pieces"), (NEIGHBOURS, "neighbours")):
        apart = []
        for frame in kinds:
            low = frame[2 * frame.layer < 1 + frame.layer.max()]
            low = low.pivot_table(index="batch", columns="quantity", values="value")
            apart += [*(low[kind] - low["other"])] if {kind, "other"} <= {*low.columns} else []
        found.score(claim, name, apart)
    found.score(CANCEL, name, -torch.cat(cancels))


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the reproduction."""
    options = read_options(
        __doc__, given, limit=60, model="causal-lm,masked-lm,minilm", tags="labels of words"
    )
    found = Reproduction("feed_forward_maps", "kobayashi2024analyzing", options)
    for name, model in load(options.model).items():
        texts = sentences(options, name)
        tags = None
        if options.tags:
            lines = Path(options.tags).read_text(encoding="utf-8").splitlines()
            tags = dict(zip(texts, map(json.loads, lines), strict=False))
        score(found, name, model, texts)
        curves = over_corpus(model, texts, changes)
        found.show(
            f"{name}: contextualization change (figure 3)", "By component and layer.", curves
        )
        found.show(f"{name}: cancellation", "", over_corpus(model, texts, undone))
        by = over_corpus(model, texts, partial(amplified, tags=tags))
        found.show(f"{name}: what FF amplifies, by kind of pair", "Change of a row's share.", by)
        found.table(f"{name}: what FF amplifies", "Change of a row's share.", by.to_dataframe())
        top = over_corpus(model, texts, pairs, value="change", category="pair")
        found.table(
            f"{name}: pairs amplified most often (table 1)",
            "Of different words, those of most texts first.",
            most_frequent(top),
        )
        rest = over_corpus(model, texts, without_outliers)
        found.table(
            f"{name}: FF's outlier dimensions",
            "Share of the two largest dimensions in the squares after FF, how much the map changes "
            "without them, and the gain of the norm that follows there.",
            rest.to_dataframe(),
        )
    return found.write()


if __name__ == "__main__":
    main()
