"""The page that compares methods on a model, and the report's section on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.loading import load_model
from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.engine.citations import sources
from tl_contextmix.errors import ContextMixError, InvalidInput
from tl_contextmix.evaluation import MinimalPair, Sentence, Unusable, demo_pairs, load_minimal_pairs
from tl_contextmix.evaluation.compare import comparable, compare
from tl_contextmix.plotting import Page, Section
from tl_contextmix.plotting.panels import Heatmap, Panel, Table
from tl_contextmix.reporting.drawing import quoted, table_of
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import Comparison
from tl_contextmix.results.headings import in_plain_words
from tl_contextmix.results.labels import package_version

COMPARISON_PATH = "tl_contextmix_comparison.html"
COMPARED = 50
_SOURCES = (
    *("mohebbi2023quantifying", "deyoung2020eraser", "abnar2020quantifying"),
    *("kobayashi2020attention", "kobayashi2021incorporating", "kobayashi2024analyzing"),
    *("modarressi2022globenc", "ferrando2022measuring", "modarressi2023decompx"),
    "sundararajan2017axiomatic",
)
# One of each kind, leaving out those that take seconds per sentence.
_SHOWN = {
    "attention": "attention",
    "attention_norms attn_out": "norms, attention",
    "attention_norms block_out": "norms, block",
    "value_zeroing": "Value Zeroing",
    "alti": "ALTI",
    "decompx": "DecompX",
}
_NOT_SHOWN = ("modarressi2022globenc", "sundararajan2017axiomatic")
_FEW = 8
_READING = (
    "Every method is judged on the same row: the position that predicts the answer. Alignment is "
    "the share of that row on the cue, the words known to decide the answer; faithfulness is how "
    "far the prediction drops when the highest-ranked words are blanked. Alignment assumes that "
    "the model uses the cue; faithfulness runs it on out-of-distribution sentences. A method can "
    "be accurate for one layer and poor across all of them."
)


def compared_page(
    model_or_name: object,
    pairs: str | Path | None = None,
    *,
    count: int | None = None,
    words: bool = False,
    unusable: Unusable = "error",
    contrast: bool = False,
) -> tuple[Page, Comparison]:
    """Returns a page on `compare` of minimal pairs, and the comparison.

    Args:
        model_or_name: A causal or masked model, or what `load_model` takes.
        pairs: A file as `load_minimal_pairs` reads it; None for a demo model's own grammar.
        count: Use only the first so many; None for all of a file, or 50 of the grammar.
        words: See `compare`.
        unusable: Likewise.
        contrast: Likewise.
    """
    if count is not None and count < 1:
        raise InvalidInput(
            "cannot compare methods", count, "at least 1 sentence", "Use 50 or more."
        )
    named = isinstance(model_or_name, (str, Path))
    model = load_model(model_or_name) if named else model_or_name
    view = as_view(model)
    listed = _listed(view.name, pairs, count)
    found = compare(model, listed, words=words, unusable=unusable, contrast=contrast)
    facts = (
        ("Model", view.name),
        ("Class", f"{view.host}, TransformerLens {view.host_version}"),
        ("Weights", ", ".join(view.processing) or "as published"),
        ("Sentences", f"{found.sentences}, such as: {listed[0].good}"),
        ("tl_contextmix", package_version()),
    )
    section = Section(
        "Which map to believe?", _READING, found.panels(), sources(*_SOURCES), _finding(found)
    )
    return Page((), title="Comparison of methods", facts=facts, sections=(section,)), found


def comparison(story: Story) -> Section | str:
    """Returns the predicting row by every method, and how each scores on minimal pairs."""
    view, focus = story.forward_pass.view, story.focus
    if focus is None:
        return "the text has no mask token to predict"
    if len(view.stacks) == 2:
        return "the comparison does not support encoder-decoders"
    if view.readout.refusal:
        return view.readout.refusal
    pairs = story.pairs
    if pairs is None and view.name in DEMO_NAMES and view.reads_text():
        pairs = demo_pairs(count=_FEW)
    panels: list[Panel] = [_rows(story)]
    finding = ""
    tested = (
        "One sentence cannot show which is right: `tl-contextmix compare --pairs` measures it "
        "on sentences with known cues, and `--pairs` adds that to this page."
    )
    if pairs is not None:
        found = compare(story.model, pairs[:_FEW], methods=tuple(_SHOWN), unusable="drop")
        likeness = found.likeness()
        shown = tuple(_SHOWN[name] for name in likeness.rows)
        panels += [_best(found), replace(likeness, rows=shown, columns=shown), *found.without()]
        finding = _finding(found)
        tested = (
            f"{_READING} With {found.sentences} sentences, intervals are wide: `tl-contextmix "
            "compare` uses more sentences and every method."
        )
    text = f"Methods disagree because they answer different questions. {tested}"
    citation = sources(*(key for key in _SOURCES if key not in _NOT_SHOWN))
    return Section("Which map to believe?", text, tuple(panels), citation, finding)


def _best(found: Comparison) -> Table:
    """Returns the first metric of every method at its best layer."""
    metric = found.metrics[0]
    costs = {cost.method: cost.forward for cost in found.costs}
    rows = [
        (
            _SHOWN[row.method],
            f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})",
            row.layer,
            costs[row.method],
        )
        for row in found.best(metric).itertuples()
    ]
    chance = found.best(metric)["chance"].iloc[0]
    known = "" if found.correct is None else f" The model is right on {found.correct}."
    return Table(
        title=f"Every method at its best layer, by {in_plain_words(metric)}",
        caption=f"95 % interval over {found.counted}; chance is {chance:.2f}.{known} "
        "The best layer is selected on the same sentences, so values are slightly optimistic. "
        "Cost: floating-point operations relative to a forward pass. ALTI: aggregation of "
        "layer-wise token-to-token interactions.",
        columns=("method", in_plain_words(metric), "layer", "cost"),
        rows=tuple(rows),
    )


def _rows(story: Story) -> Heatmap:
    """Returns the predicting row of every method, from the input to the last layer."""
    tokens = story.forward_pass.target
    assert story.focus is not None
    here = tokens.strings[0][story.focus]
    asked = Sentence(tokens.ids[:1], story.focus, story.answer)
    names, rows, skipped = [], [], []
    for name in _SHOWN:
        try:
            map = comparable()[name](story.model, asked).normalize()
            whole = map if map.from_input else map.rollout()
        except ContextMixError:
            skipped.append(_SHOWN[name])
            continue
        names.append(_SHOWN[name])
        rows.append(whole.normalize().scores[0, -1, 0, story.focus].detach().cpu())
    missing = f" Not available for this model: {', '.join(skipped)}." if skipped else ""
    return table_of(
        torch.stack(rows),
        names,
        tokens.strings[0],
        title=f"Sources of {quoted(here)} by method",
        caption="From the input through all layers: rollouts of single-layer maps, or propagated "
        f"vectors (DecompX). Each row sums to 1.{missing}",
        unit="share of row",
    )


def _listed(name: str, pairs: str | Path | None, count: int | None) -> tuple[MinimalPair, ...]:
    if pairs is not None:
        return load_minimal_pairs(pairs)[:count]
    if name in DEMO_NAMES:
        return demo_pairs(count=count or COMPARED)
    raise InvalidInput(
        "cannot compare methods without sentences",
        f"{name}, which is not a demo model, and no minimal pairs",
        "a file of minimal pairs, one JSON object per line",
        "Pass --pairs FILE, for example one of BLiMP's.",
    )


_METRICS = {
    "dot": "aligned with the cue",
    "average precision": "at ranking the cue first",
    "blank-out": "at ranking tokens as blanking them does (blank-out)",
    "comprehensiveness": "by comprehensiveness",
    "sufficiency": "by sufficiency",
}


def _finding(found: Comparison) -> str:
    """Returns the best method; where intervals overlap, that none is."""
    first = found.metrics[0]
    table = found.best(first)
    best = table.iloc[0]
    figures = (
        f"{best['value']:.2f} ({best['low']:.2f} to {best['high']:.2f}; chance "
        f"{best['chance']:.2f})"
    )
    where = f"{_SHOWN.get(best['method'], best['method'])} at layer {best['layer']}"
    finding = f"Best {_METRICS.get(first, f'by {first}')}: {where}, {figures}."
    others = table.iloc[1:]
    alike = others[(others["high"] >= best["low"]) & (others["low"] <= best["high"])]
    if len(alike):
        names = [_SHOWN.get(str(name), str(name)) for name in alike["method"]]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        finding += f" It does not stand out: intervals overlap with {shown}."
    return finding
