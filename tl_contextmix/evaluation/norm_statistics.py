"""Statistics of the norm papers: word alignment, word frequency, what a head's matrix expands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.statistics import spearman
from tl_contextmix.core.validation import LATER, checked
from tl_contextmix.core.words import is_mark
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results import ContextMap, CurvePoint, LayerCurves, LayerFigures, TokenFigures
from tl_contextmix.results.curves import EVERY, curve_point

Links = Annotated[Sequence[Any], LATER]
_DRAWS = 1000


@checked
def alignment_error_rate(
    map: ContextMap, sure: Links, possible: Links | None = None
) -> LayerCurves:
    r"""Returns how far a map's strongest links are from a word alignment (Och & Ney 2000).

    Each target is linked to the source with the highest score, and with :math:`A` these links,

    .. math:: \mathrm{AER} = 1 - \frac{|A \cap S| + |A \cap P|}{|A| + |S|}

    over all sentences (Kobayashi et al. 2020, section 5). Targets and sources that are marks, such
    as ``<s>``, are in no link. Lower is better; 0 is the alignment itself.

    Args:
        map: Of cross-attention, such as ``attention_norms(..., at="attn_out", stack="cross")``;
            ``.words()`` of it for links between words.
        sure: For each sentence the sure links, as pairs of positions ``(target, source)`` on the
            axes of the whole map.
        possible: Likewise those that are possible, which the sure ones belong to; None: the sure
            ones alone.

    Returns:
        `LayerCurves`, metric ``"AER"``, by head (category) and layer, with 95 % bootstrap intervals
        over sentences.

    Raises:
        InvalidInput: If there are not links of each sentence, or one is outside of the map.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import alignment_error_rate
        >>> model = cm.load_demo("encoder-decoder")
        >>> french = {"decoder_input": "la batte brûlait .", "stack": "cross"}
        >>> maps = cm.attention_norms(model, "the bat burned .", at="attn_out", **french)
        >>> predicts = [(0, 0), (1, 1), (2, 2), (3, 3)]  # <pad> predicts the first word
        >>> found = alignment_error_rate(maps.words(), [predicts])
        >>> print(*(round(point.value, 2) for point in found.points))
        0.5 0.5 0.43 0.14
    """
    gold = [(_links(map, row, s), _links(map, row, p)) for row, s, p in _rows(map, sure, possible)]
    points = []
    for place, head in enumerate(map.heads):
        category = EVERY if len(map.heads) == 1 else f"head {head}"
        for column, layer in enumerate(map.layers):
            counts = []
            for row, (certain, likely) in enumerate(gold):
                found = _strongest(map, row, map.scores[row, column, place])
                hits = len(found & certain) + len(found & (likely | certain))
                counts.append((float(hits), float(len(found) + len(certain))))
            points.append(curve_point("AER", _error, category, layer, counts))
    return LayerCurves(
        points=tuple(points),
        title="Alignment error rate",
        caption=f"Of the strongest source of each target, over {len(gold)} sentences; lower is "
        "better.",
        provenance=map.provenance,
    )


def _error(sums: Sequence[float]) -> float:
    return 1 - sums[0] / sums[1] if sums[1] else float("nan")


def _rows(map: ContextMap, sure: Any, possible: Any) -> list[tuple[int, Any, Any]]:
    count, both = len(map.scores), (sure, sure if possible is None else possible)
    if any(not isinstance(one, Sequence) or len(one) != count for one in both):
        raise InvalidInput(
            "links do not fit the sentences",
            f"{seen(sure)} for {count} sentences",
            "a list of pairs (target, source) for each sentence",
            "Pass an empty list for a sentence without links.",
        )
    return [(row, *some) for row, some in enumerate(zip(*both, strict=True))]


def _links(map: ContextMap, row: int, pairs: Any) -> set[tuple[int, int]]:
    """Returns links as places on the axes, whatever part of the input these are."""
    places = [
        {number: at for at, number in enumerate(side.labels()) if side.mask[row, at]}
        for side in (map.target, map.source)
    ]
    try:
        links = [(int(target), int(source)) for target, source in pairs]
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            "these are no links",
            f"{seen(pairs)} in sentence {row}",
            "pairs (target, source) of whole numbers",
            "Give possible links on their own, as possible=.",
        ) from error
    result = set[tuple[int, int]]()
    for target, source in links:
        if target not in places[0] or source not in places[1]:
            raise InvalidInput(
                "a link is outside of the map",
                f"{(target, source)} in sentence {row}",
                f"a target of {[*places[0]]}, a source of {[*places[1]]}",
                "Count positions as the map does, marks included.",
            )
        result.add((places[0][target], places[1][source]))
    return result


def _strongest(map: ContextMap, row: int, scores: torch.Tensor) -> set[tuple[int, int]]:
    """Returns the link of each target that is no mark to its strongest source, if that is none."""
    sides = (map.target, map.source)
    words = [
        [r and not is_mark(s) for s, r in zip(side.strings[row], side.mask[row], strict=True)]
        for side in sides
    ]
    best = scores.detach().masked_fill(~map.source.mask[row].to(scores.device), -torch.inf)
    pairs = enumerate(best.argmax(-1).tolist())
    return {(t, s) for t, s in pairs if words[0][t] and words[1][s]}


@checked
def frequency_correlation(
    figures: TokenFigures, frequencies: Annotated[Mapping[int, int] | Mapping[int, float], LATER]
) -> LayerCurves:
    r"""Returns whether a figure of tokens goes with how frequent they are, layer by layer.

    .. math:: \rho(x_i, \mathrm{rank}(w_i))

    Spearman's correlation over tokens :math:`w_i` of the figure :math:`x_i`, such as
    `tl_contextmix.mixing_ratio`, and the token's frequency rank, 1 being the most frequent: above 0
    rare tokens have the larger figures (Kobayashi et al. 2021, section 5.2, table 3). Marks such as
    ``[CLS]`` are left out.

    Args:
        figures: A figure for each token and layer.
        frequencies: How often each token id occurs; of the same texts
            ``Counter(figures.tokens.ids[figures.tokens.mask].tolist())``.

    Returns:
        `LayerCurves`, metric ``"frequency rank"``, with 95 % bootstrap intervals over sentences.

    Raises:
        InvalidInput: If the frequency of a token is not known.

    Example:
        >>> from collections import Counter
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import frequency_correlation
        >>> texts = ["the keys to the cabinet are old .", "the doctors near the farmer sing ."]
        >>> ratios = cm.mixing_ratio(cm.load_demo("masked-lm"), texts)
        >>> counts = Counter(ratios.tokens.ids[ratios.tokens.mask].tolist())
        >>> found = frequency_correlation(ratios, counts)
        >>> len(found.points), found.points[0].sentences
        (4, 2)
    """
    tokens = figures.tokens
    kept = [
        [place for place, real in enumerate(mask) if real and not is_mark(words[place])]
        for words, mask in zip(tokens.strings, tokens.mask.tolist(), strict=True)
    ]
    ids = [tokens.ids[row, some].tolist() for row, some in enumerate(kept)]
    if not isinstance(frequencies, Mapping):
        raise InvalidInput(
            "these are no frequencies",
            seen(frequencies),
            "how often each token id occurs, by id",
            "Pass a dictionary, of an array dict(enumerate(array)).",
        )
    unknown = {i for row in ids for i in row} - {*frequencies}
    if unknown:
        raise InvalidInput(
            "the frequency of a token is not known",
            f"token ids {sorted(unknown)[:5]}",
            "a frequency for every token of the figures",
            "Count them in the texts, or give those of a corpus with 0 for what it lacks.",
        )
    # Tokens of one frequency share a rank, as in the correlation.
    counts = torch.tensor([[-float(frequencies[i]) for row in ids for i in row]]).double()[0]
    rows = torch.tensor([row for row, some in enumerate(ids) for _ in some])
    points = []
    for column, layer in enumerate(figures.layers):
        each = figures.values[:, column].detach().cpu()
        values = torch.cat([each[row, some] for row, some in enumerate(kept)]).double()
        value, low, high = _resampled(lambda at, v=values: spearman(v[at], counts[at]), rows)
        points.append(CurvePoint("frequency rank", EVERY, layer, value, low, high, len(ids)))
    return LayerCurves(
        points=tuple(points),
        title="Correlation with frequency rank",
        caption=f"Spearman's correlation over {len(counts):,} tokens of {figures.title.lower()} "
        "and frequency rank: above 0, rare tokens have more.",
        provenance=figures.provenance,
    )


def _resampled(
    figure: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> tuple[float, float, float]:
    """Returns a figure of tokens, and its interval when whole sentences are drawn."""
    each = [(rows == row).nonzero()[:, 0] for row in rows.unique().tolist()]
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_DRAWS if len(each) > 1 else 0):
        some = torch.randint(len(each), (len(each),), generator=generator).tolist()
        drawn.append(float(figure(torch.cat([each[row] for row in some]))))
    values = torch.tensor(drawn, dtype=torch.float64)
    values = values[~values.isnan()]
    low, high = float("nan"), float("nan")
    if len(values):
        low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return float(figure(torch.arange(len(rows)))), low, high


@checked
def expansion_rates(model: object, *, stack: StackName | None = None) -> LayerFigures:
    r"""Returns how much a head's value and output matrices lengthen vectors, from weights alone.

    For a vector :math:`x` of random direction, with :math:`\sigma_i` the singular values of
    :math:`W = W_V W_O`,

    .. math:: \sqrt{\mathrm{E} \frac{||x W||^2}{||x||^2}} = \sqrt{\frac{\sum_i \sigma_i^2}{d}}

    (Kobayashi et al. 2021, section 4.4).

    Args:
        model: Any TransformerLens model.
        stack: See `tl_contextmix.decompose`.

    Returns:
        `LayerFigures` [batch layer quantity], of one row: the rate of each head, and of all heads
        together (:math:`\sum_h W_V^h W_O^h`); NaN where a layer has no attention.

    Raises:
        InvalidInput: If there is no such stack.

    Cost: ``2 d^2 d_head`` operations for each head.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import expansion_rates
        >>> rates = expansion_rates(cm.load_demo("masked-lm"))
        >>> whole = rates.select(quantity="all heads").values.flatten()
        >>> print(*(round(float(rate), 2) for rate in whole))
        0.33 0.39 0.49 0.47
    """
    view = as_view(model)
    blocks = view.stacks[view.base_stack(stack)]
    heads = max(len(block.attention("self").W_V) for block in blocks if block.attentions)
    values = torch.full((1, len(blocks), heads + 1), torch.nan, dtype=torch.float64)
    for place, block in enumerate(blocks):
        if not block.attentions:
            continue
        read = block.attention("self")
        both = read.W_V.double() @ read.W_O.double()
        rates = both.square().sum((1, 2)).div(both.shape[1]).sqrt()
        values[0, place, : len(rates)] = rates.detach().cpu()
        values[0, place, heads] = float(both.sum(0).norm()) / both.shape[1] ** 0.5
    return LayerFigures(
        values=values,
        layers=tuple(block.layer for block in blocks),
        quantities=(*(f"head {head}" for head in range(heads)), "all heads"),
        title="Expansion rate",
        caption="Root mean square of ||x W_V W_O|| / ||x|| over directions of x: weights alone.",
        unit="rate",
        provenance=provenance(view, "expansion_rates", {"stack": stack}),
    )
