"""Rank agreement between two maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tl_contextmix.core.statistics import kendall, spearman
from tl_contextmix.core.validation import checked
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation.aggregation import Figures, Maps, readable, sentences, summarise
from tl_contextmix.results import ContextMap, Score


@checked
@method(cites=("mohebbi2023quantifying",), on_text=False)
def agreement(a: Maps, b: Maps) -> Score:
    """Returns how similarly two maps rank the sources of a target.

    Per layer, over the rows with at least two readable sources that are not all tied in either map:
    Spearman's rank correlation and Kendall's tau-b, averaged first over the rows of a sentence,
    then over sentences. Chance is 0 for both.

    Args:
        a: One map, or one per sentence.
        b: The other, over the same tokens and layers.

    Raises:
        InvalidInput: If the maps cover different tokens or layers.
    """
    found: Figures = {}
    name = ""
    one, two = list(sentences(a)), list(sentences(b))
    if len(one) != len(two):
        raise InvalidInput(
            "the maps cover different sentences",
            f"{len(one)} and {len(two)} sentences",
            "equally many",
            "Run both methods on the same input.",
        )
    for (first, row), (second, other) in zip(one, two, strict=True):
        _require_same(first, second)
        name = f"{first.provenance.method} / {second.provenance.method}"
        for layer, label in enumerate(first.layer_names):
            for metric, statistic in (("Spearman", spearman), ("Kendall", kendall)):
                value = _row_mean(first, second, (row, other), layer, statistic)
                found.setdefault((label, metric), []).append((value, 0.0))
    return Score(
        rows=summarise(name, found),
        title="Agreement between maps",
        caption="Rank correlation of the sources of each target, averaged. 0: no agreement.",
    )


def _require_same(a: ContextMap, b: ContextMap) -> None:
    same = a.target.equals(b.target) and a.source.equals(b.source)
    if not same or a.layers != b.layers:
        raise InvalidInput(
            "the maps cover different tokens or layers",
            f"shapes {tuple(a.scores.shape)} and {tuple(b.scores.shape)}",
            "two maps of one input",
            "Run both methods on the same input, layers and stack.",
        )


def _row_mean(
    a: ContextMap,
    b: ContextMap,
    rows: tuple[int, int],
    layer: int,
    statistic: Callable[[Tensor, Tensor], Tensor],
) -> float:
    values = []
    for place in a.target.mask[rows[0]].nonzero()[:, 0].tolist():
        seen = readable(a, rows[0], place)
        pair = (
            a.scores[rows[0], layer, 0, place].cpu()[seen].double(),
            b.scores[rows[1], layer, 0, place].cpu()[seen].double(),
        )
        if len(pair[0]) > 1:
            values.append(statistic(*pair))
    found = torch.stack(values) if values else torch.full((1,), torch.nan)
    return float(found[~found.isnan()].mean())
