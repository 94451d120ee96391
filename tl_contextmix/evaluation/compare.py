"""Compares every method on the same sentences, in one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Ids, Labels, label, name_tokens
from tl_contextmix.adapters.passes import provenance, run_pass
from tl_contextmix.adapters.questions import Answer, Target
from tl_contextmix.core.blocks import Side
from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.statistics import spearman
from tl_contextmix.core.validation import LATER
from tl_contextmix.engine.registry import Method, method, methods
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.evaluation import (
    Cues,
    Drop,
    MinimalPair,
    Sentence,
    Unusable,
    blank_token,
    blanked,
    cue_alignment,
    faithfulness_of,
    sentences_of,
    warn_of_short,
)
from tl_contextmix.evaluation.aggregation import readable
from tl_contextmix.results import Comparison, ContextMap, Cost, ScoreRow

Make = Callable[[Any, Sentence], ContextMap]
Sentences = Annotated[Sequence[str] | Sequence[Ids] | Ids | Sequence[MinimalPair], LATER]


def comparable() -> dict[str, Make]:
    """Returns the methods to compare, by row name."""
    return {
        row: partial(_ask, known, options)
        for known in methods().values()
        for row, options in known.compared.items()
    }


def _ask(known: Method, options: Mapping[str, Any], model: Any, sentence: Sentence) -> ContextMap:
    about = vars(sentence.answer) if known.of_prediction else {}
    named = {"labels": sentence.labels} if sentence.labels is not None else {}
    return known.function(model, sentence.tokens, **options, **about, **named)


@method(cites=("mohebbi2023quantifying", "deyoung2020eraser"), on_text=False)
def compare(
    model: object,
    input: Sentences,
    *,
    cues: Cues | None = None,
    methods: Sequence[str] | Mapping[str, Callable[[Any, Tensor], ContextMap]] | None = None,
    words: bool = False,
    blank: int | None = None,
    unusable: Unusable = "error",
    target: Target | None = None,
    foil: Target | None = None,
    contrast: bool = False,
    labels: Labels | None = None,
) -> Comparison:
    """Returns how well each method's maps score on the same sentences, and their cost.

    Maps are row-normalized and evaluated per layer and, if they cover single layers, as rollouts
    through all of them: as `ContextMap.rollout` makes them (``"input to 3"``), and with the
    identity added where that does not, or without it where it does (``"input to 3, with
    identity"``). Metrics use the row of the predicting position: the last one in a causal model,
    the mask in a masked one.

    * `cue_alignment`, if cues are given: ``dot`` and ``average precision``.
    * `faithfulness`: ``blank-out``, ``comprehensiveness``, ``sufficiency``.
    * Similarity of the methods from the input to the last layer: Spearman's correlation.
    * Cost per sentence: seconds on this machine, and FLOPs.

    Every value comes with a 95 % bootstrap interval over sentences and its chance level. All
    methods are evaluated on the same rows of the same sentences, whose figures the result keeps:
    ``difference`` says whether one method is better than another.

    Args:
        model: A causal or masked language model.
        input: Texts or rows of token ids (of a masked model, with its mask token), or minimal pairs
            (`load_minimal_pairs`, `demo_pairs`): a causal model then reads their common prefix, a
            masked one the sentence with the differing word masked.
        cues: For texts and ids: the cues of each sentence, see `cue_alignment`. None: those of the
            pairs, or no alignment.
        methods: Names of rows (``"alti"``, ``"attention_norms mlp_out"``), or functions of a model
            and token ids [1, pos] that return a `ContextMap`, by name; None for all. Then methods
            that do not support the model are skipped, and listed in the result with the reason.
        words: Whether to aggregate maps over the tokens of each word first (`ContextMap.words`).
        blank: Token id that replaces blanked tokens, see `faithfulness`.
        unusable: ``"drop"`` skips sentences that cannot be scored on the model (words of several
            tokens under one mask, no token before the differing word) and lists them with the
            reason in `Comparison.dropped`; ``"error"`` raises on the first one.
        target: For texts: what is asked about, see `Asked`. None: the model's best.
        foil: For texts: what it is contrasted with, see `Asked`.
        contrast: For minimal pairs: whether the wrong word is the right one's foil. Faithfulness
            then is that of the model's choice between the two, and maps of a prediction explain it.
        labels: Names of the token ids, for ``target`` and ``foil``, see `Inputs`. A model without
            a tokenizer needs ``blank``, too.

    Raises:
        InvalidInput: If sentences, cues or methods do not fit the model.
        UnsupportedModel: If the model has no trained vocabulary readout or two stacks, or a named
            method does not support it.

    Warns:
        ContextMixWarning: If no sentence is long enough for `faithfulness`.

    Cost: every method once per sentence, and `faithfulness` of every map.
    """
    view = name_tokens(as_view(model), labels)
    view.readout.require()
    sentences, dropped = sentences_of(
        model, view, input, cues, unusable, answer=Answer(target, foil), contrast=contrast
    )
    token = blank_token(model, view) if blank is None else blank
    drops = [_blanked(view, s, token, words) for s in sentences]
    known = []
    for one, drop in zip(sentences, drops, strict=True):
        answer = one.answer
        if answer.target is None:  # the model's own prediction
            answer = replace(answer, target=int(drop.answer.target[0]))
        known.append(replace(one, answer=answer, labels=labels))
    supported, flops, left_out = _supported(model, known, methods)
    maps, seconds = _run(supported, model, known)
    middle = _middle(known)
    forward = count_operations(lambda: run_pass(view, Given(middle.tokens), logits=True).trace)
    rows: list[ScoreRow] = []
    whole: dict[str, list[Tensor]] = {}
    for name in supported:
        found = [_taken(map, s, words) for map, s in zip(maps[name], known, strict=True)]
        rows += _figures(name, found, drops)
        if all(one.rollouts for one in found):
            whole[name] = [_row(next(iter(one.rollouts.values())), one.place) for one in found]
    costs = [
        Cost(name, statistics.median(seconds[name]), flops[name], flops[name] / forward)
        for name in supported
    ]
    warn_of_short(drops)
    return Comparison(
        rows=tuple(rows),
        costs=tuple(costs),
        alike=_alike(list(whole.values())),
        alike_methods=tuple(whole),
        left_out=left_out,
        correct=None
        if any(one.wrong is None for one in known)
        else sum(drop.prefers(one.wrong) for one, drop in zip(known, drops, strict=True)),
        sentences=len(known),
        dropped=dropped,
        provenance=provenance(
            view,
            "compare",
            {"words": words, "blank": blank, "unusable": unusable, "contrast": contrast},
        ),
    )


def _blanked(view: ModelView, sentence: Sentence, blank: int, words: bool) -> Drop:
    spans = None
    if words:
        side = Side(sentence.tokens, torch.ones_like(sentence.tokens, dtype=torch.bool))
        spans = label(view, "", side).words()[0]
    return blanked(view, sentence.tokens[0], sentence.answer, blank, spans)


def _supported(
    model: object,
    sentences: Sequence[Sentence],
    methods: Sequence[str] | Mapping[str, Callable[[Any, Tensor], ContextMap]] | None,
) -> tuple[dict[str, Make], dict[str, int], tuple[tuple[str, str], ...]]:
    """Returns the methods, their FLOPs on the middle sentence, and those skipped."""
    chosen, flops, left_out = _methods(methods), {}, []
    for name, make in chosen.items():
        ask = partial(make, model, _middle(sentences))
        try:
            # One-time work of the first call does not count.
            found = ask()
            if not isinstance(found, ContextMap):
                raise InvalidInput(
                    f"the method {name!r} cannot be compared",
                    f"a {type(found).__name__}",
                    "a ContextMap of the given token ids",
                    "Return the result of a method of this package, or build a ContextMap.",
                )
            flops[name] = count_operations(ask)
        except UnsupportedModel as error:
            if methods is not None:
                raise
            left_out.append((name, str(error)))
    return {name: chosen[name] for name in flops}, flops, tuple(left_out)


def _middle(sentences: Sequence[Sentence]) -> Sentence:
    """Returns a sentence of median length."""
    return sorted(sentences, key=lambda s: s.tokens.shape[1])[len(sentences) // 2]


def _run(
    methods: Mapping[str, Make], model: object, sentences: Sequence[Sentence]
) -> tuple[dict[str, list[ContextMap]], dict[str, list[float]]]:
    """Returns every method's maps and their run times; methods alternate."""
    maps: dict[str, list[ContextMap]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for sentence in tqdm(sentences, desc="compare", leave=False, disable=None, delay=2):
        for name, make in methods.items():
            start = time.perf_counter()
            maps[name].append(make(model, sentence))
            seconds[name].append(time.perf_counter() - start)
    return maps, seconds


@dataclass(frozen=True)
class _Taken:
    """What is evaluated of a method's map of one sentence.

    Attributes:
        layers: Its layers.
        rollouts: The maps from the input to the last layer, by what is added to the layer's name.
        place: The target's row.
        cues: The cues.
    """

    layers: ContextMap
    rollouts: Mapping[str, ContextMap]
    place: int
    cues: list[int | str]


def _taken(map: ContextMap, sentence: Sentence, words: bool) -> _Taken:
    """Returns the per-layer maps, those from input to last layer, target row and cues."""
    if len(map.heads) > 1:
        map = map.mean("head")
    layers = map.normalize()
    whole = {}
    if layers.from_input:
        whole = {"": layers}
    elif layers.target.equals(layers.source) and layers.layers == (*range(len(layers.layers)),):
        other = layers.includes_residual
        name = ", with identity" if other else ", without identity"
        whole = {"": layers.rollout(), name: layers.rollout(add_identity=other)}
    last = {name: one.select(layer=-1) for name, one in whole.items()}
    place = 0 if map.target.ids.shape[1] == 1 else sentence.place
    cues = list(sentence.cues)
    if not words:
        return _Taken(layers, last, place, cues)
    spans, rows = map.source.words()[0], map.target.words()[0]
    cues = [_holding(spans, cue) if isinstance(cue, int) else cue for cue in cues]
    merged = {name: one.words() for name, one in last.items()}
    return _Taken(layers.words(), merged, _holding(rows, place), [*dict.fromkeys(cues)])


def _holding(spans: Sequence[tuple[int, int]], place: int) -> int:
    """Returns the word that holds a token; an invalid position is returned, to be refused."""
    return next((w for w, (start, stop) in enumerate(spans) if start <= place < stop), place)


def _figures(name: str, found: Sequence[_Taken], drops: Sequence[Drop]) -> list[ScoreRow]:
    kinds = [("", [one.layers for one in found])]
    if not any(one.layers.from_input for one in found):
        shared = [how for how in found[0].rollouts if all(how in one.rollouts for one in found)]
        kinds += [(how, [one.rollouts[how] for one in found]) for how in shared]
    places, cues = [one.place for one in found], [one.cues for one in found]
    rows: list[ScoreRow] = []
    for how, maps in kinds:
        numbers = [_number(map, place) for map, place in zip(maps, places, strict=True)]
        aligned = cue_alignment(maps, cues, pos=numbers, method=name).rows if all(cues) else ()
        some = (*aligned, *faithfulness_of(maps, drops, places).rows)
        rows += [replace(row, method=name, layer=f"{row.layer}{how}") for row in some]
    return rows


def _number(map: ContextMap, place: int) -> int:
    """Returns the position of a row; that of one which is not there is returned, to be refused."""
    return dict(enumerate(map.target.labels())).get(place, place)


def _row(map: ContextMap, place: int) -> Tensor:
    """Returns the readable part of the target's row."""
    scores = map.scores[0, -1, 0, place].cpu().double()
    return scores[readable(map, 0, place)]


def _alike(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns the mean rank correlation of each two methods' rows, over sentences without NaN."""
    result = torch.full((len(rows), len(rows)), torch.nan, dtype=torch.float64)
    for a, first in enumerate(rows):
        for b, second in enumerate(rows):
            # Gradient maps of a causal model do not extend beyond the target.
            pairs = [(x[: len(y)], y[: len(x)]) for x, y in zip(first, second, strict=True)]
            values = torch.stack([spearman(x, y) for x, y in pairs])
            result[a, b] = values[~values.isnan()].mean()
    return result


def _methods(methods: Any) -> dict[str, Make]:
    known = comparable()
    if methods is None:
        return known
    if isinstance(methods, Mapping) and methods:
        return {
            name: lambda model, s, make=make: make(model, s.tokens)
            for name, make in methods.items()
        }
    listed = [*methods] if isinstance(methods, (list, tuple)) else []
    unknown = [name for name in listed if name not in known]
    if unknown or not listed:
        raise InvalidInput(
            "unknown methods",
            repr(unknown or methods),
            f"a list of some of {list(known)}",
            "Or pass a dict of functions of a model and token ids.",
        )
    return {name: known[name] for name in listed}
