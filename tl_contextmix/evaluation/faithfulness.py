"""Faithfulness: does the prediction depend on the tokens that a map ranks high?"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Labels, make_batch, name_tokens
from tl_contextmix.adapters.inputs.model_arguments import require_same_arguments
from tl_contextmix.adapters.questions import Answer, Question, Target, ask, one_each
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.finite import require_predictions
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.statistics import spearman
from tl_contextmix.core.validation import whole_number
from tl_contextmix.core.words import Spans
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, UnsupportedModel, warn
from tl_contextmix.evaluation.aggregation import Figures, Maps, per_sentence, sentences, summarise
from tl_contextmix.results import ContextMap, Score

# Batch size for variants of a sentence with different tokens blanked.
_TOGETHER = 64
# Random orders per sentence. With 5 the chance level of 50 sentences was 0.4 nats off, with 20
# two draws agree to 0.02.
_ORDERS = 20


@method(cites=("deyoung2020eraser",), on_text=False)
def faithfulness(
    model: object,
    input: Input,
    map: ContextMap,
    *,
    pos: int | Sequence[int] | None = None,
    blank: int | None = None,
    target: Target | None = None,
    foil: Target | None = None,
    labels: Labels | None = None,
) -> Score:
    r"""Returns whether the prediction depends on the tokens that a map ranks high.

    Every real token but the target is blanked in turn; :math:`\Delta_j` is the drop in the
    answer's log-probability, with a foil in that less the foil's. Per layer:

    * ``blank-out``: Spearman's correlation of the target's row with :math:`\Delta`.
    * ``comprehensiveness``: mean drop (nats) as the highest-ranked tokens are blanked one by one
      (area under that curve, DeYoung et al. 2020); high for a good map. Chance: the mean
      over 20 random orders per sentence.
    * ``sufficiency``: mean drop when only they are kept; low for a good map.

    Ties are averaged over random orders. Tokens that equal the blank (in many causal models, the
    beginning-of-sequence token) cannot be blanked and are not ranked. Rows with a NaN score NaN.

    Args:
        model: A causal or masked language model.
        input: The text, texts or token ids of the map.
        map: A map with one score per pair and layer, for all targets or only this one.
        pos: The predicting position, one for all or one per sentence; negative counts from
            the last real token. Masked models predict the token at this position, causal ones the
            next. None: the last real token, or the mask.
        blank: Token id that replaces blanked tokens; None for the tokenizer's mask, unknown,
            padding or end-of-sequence token.
        target: The answer, a token or a set, see `Asked`; None for the model's own predictions.
        foil: What it is contrasted with, see `Asked`.
        labels: Names of the token ids, for ``target`` and ``foil``, see `Inputs`.

    Returns:
        A `Score` with 95 % bootstrap intervals over sentences.

    Raises:
        InvalidInput: If the map is of other tokens, or an argument does not match the model.
        UnsupportedModel: If the model has no trained vocabulary readout, or two stacks.

    Warns:
        ContextMixWarning: If no sentence is long enough: every value is NaN.

    Cost: per sentence of ``n`` tokens, ``2 n`` forward passes per layer and at most ``41 n`` more,
    batched; sets of tokens shared between layers run once.
    """
    view = name_tokens(as_view(model), labels)
    batch = make_batch(view, Given(input, _mask_of(map, input)))
    if not isinstance(map, ContextMap) or not torch.equal(batch.main.ids.cpu(), map.source.ids):
        raise InvalidInput(
            "the map is of a different input",
            f"{map.source.ids.tolist()}" if isinstance(map, ContextMap) else type(map).__name__,
            f"a ContextMap of the tokens {batch.main.ids.tolist()}",
            "Pass the map's text, or its token ids if it was computed with prepend_bos=False.",
        )
    require_same_arguments(view, map.provenance.options, batch)
    count = len(map.source.strings)
    places = [None] * count if pos is None else per_sentence(pos, count)
    targets, foils = one_each(target, count, "target"), one_each(foil, count, "foil")
    blank = blank_token(model, view) if blank is None else blank
    drops = []
    for row, asked in enumerate(zip(targets, foils, places, strict=True)):
        real = map.source.mask[row]
        further = {name: value[row].cpu()[real] for name, value in batch.further.items()}
        ids = map.source.ids[row][real]
        drops.append(blanked(view, ids, Answer(*asked), blank, further=further))
    warn_of_short(drops)
    return faithfulness_of(map, drops)


def _mask_of(map: object, input: object) -> Tensor | None:
    """Returns the map's attention mask for token ids."""
    if not isinstance(map, ContextMap) or not isinstance(input, Tensor):
        return None
    mask = map.source.mask
    return mask.view(input.shape) if input.numel() == mask.numel() else None


def warn_of_short(drops: Sequence[Drop]) -> None:
    """Warns if no sentence has enough tokens to blank."""
    if drops and all(len(drop.others) < 2 for drop in drops):
        warn(
            "faithfulness is NaN: no sentence has at least two tokens, or words, to blank besides "
            "the predicting one. Use longer sentences."
        )


def faithfulness_of(
    maps: Maps, drops: Sequence[Drop], places: Sequence[int] | None = None
) -> Score:
    """Returns `faithfulness`, reusing predictions on blanked sentences.

    Args:
        maps: One map, or one per sentence.
        drops: The sentences, which cache what was measured for other maps.
        places: The target's index on each map's axis; None: found by its position.

    Raises:
        InvalidInput: If a map has several heads or no row for the target.
    """
    found: Figures = {}
    listed = list(sentences(maps))
    for number, ((map, row), drop) in enumerate(zip(listed, drops, strict=True)):
        real = map.source.mask[row].nonzero()[:, 0]
        index = _row_of(map, row, drop, real) if places is None else places[number]
        for layer, label in enumerate(map.layer_names):
            scores = map.scores[row, layer, 0, index].cpu()[real]
            for metric, value, chance in drop.figures(scores):
                found.setdefault((label, metric), []).append((value, chance))
    return Score(
        rows=summarise(listed[0][0].provenance.method if listed else "", found),
        title="Faithfulness",
        caption="Drop in the answer's log-probability (nats) when tokens are blanked. "
        "Comprehensiveness: higher is better; sufficiency: lower is better.",
    )


def _row_of(map: ContextMap, row: int, drop: Drop, real: Tensor) -> int:
    """Returns the target's row of a map with all targets or some."""
    place = int(map.source.positions()[row, real[drop.place]])
    rows = (map.target.positions()[row] == place) & map.target.mask[row].cpu()
    if not bool(rows.any()):
        raise InvalidInput(
            "the map has no row for the target",
            f"rows for positions {map.target.positions()[row].tolist()}",
            f"one for position {place}",
            "Compute the map for all targets, or for this one.",
        )
    return int(rows.nonzero()[0])


def blanked(
    view: ModelView,
    ids: Tensor,
    answer: Answer,
    blank: int,
    spans: Spans | None = None,
    further: Mapping[str, Tensor] = MappingProxyType({}),
) -> Drop:
    """Returns a sentence prepared for blanking.

    Args:
        view: A causal or masked language model.
        ids: Its tokens [pos], no padding.
        answer: What is asked about it.
        blank: The token that replaces others.
        spans: Words to blank as a whole; None for single tokens.
        further: What the model is given of each token besides its id [pos].
    """
    view.readout.require()
    if len(view.stacks) == 2:
        raise UnsupportedModel(
            "faithfulness does not support encoder-decoders",
            f"{view.name}, which has two stacks",
            "a causal or masked language model",
            "Use cue_alignment or agreement.",
        )
    ids = ids.cpu()
    side = Side(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
    alone = Batch(side, None, {name: value[None] for name, value in further.items()})
    question = ask(view, alone, answer)
    if len(question.rows) != 1:
        raise InvalidInput(
            "faithfulness is of one prediction in each sentence",
            f"{len(question.rows)} predictions",
            "one position, and a target of one token",
            "Ask about one token of the answer: give it the text before, and that token.",
        )
    if whole_number(blank) is None or not 0 <= blank < view.d_vocab:
        expected = f"an integer from 0 to {view.d_vocab - 1}"
        raise InvalidInput("blank is not a token id", repr(blank), expected, "Pass another.")
    units = [(i, i + 1) for i in range(len(ids))] if spans is None else [*spans]
    return Drop(question, blank, units)


class Drop:
    """Drops in an answer's log-probability when units of a sentence are blanked.

    With a foil they are drops of the answer's log-odds. A unit is a token, or the tokens of a word.

    Attributes:
        place: The predicting position.
        unit: Its unit.
        others: The other units that the prediction can depend on and that blanking changes.
        answer: What is asked of the logits.
        real: What they say with nothing blanked.
    """

    def __init__(self, question: Question, blank: int, units: Spans) -> None:
        view, ids = question.view, question.batch.main.ids[0]
        self._question, self._view, self._ids = question, view, ids
        self._blank, self._units = blank, units
        self.place = place = int(question.rows[0])
        self.unit = next(u for u, (start, stop) in enumerate(units) if start <= place < stop)
        # A causal model's prediction cannot depend on later tokens.
        last = self.unit if "decoder" in view.stacks else len(units)
        self.others = [
            unit
            for unit, (start, stop) in enumerate(units[:last])
            if unit != self.unit and bool((ids[start:stop] != blank).any())
        ]
        self._real = self._log_probs(ids[None])
        self.answer = question.contrast(self._real)
        self.real = float(self.answer.score(self._real)[0])
        self._known: dict[frozenset[int], float] = {frozenset(): 0.0}
        self._orders = _shuffled(self.others, zlib.crc32(bytes(str(ids.tolist()), "ascii")))
        self._random: float | None = None

    def prefers(self, token: int) -> bool:
        """Returns whether the model finds the answer more probable than another token."""
        other = (torch.tensor([token]),)
        return bool(Contrast(self.answer.target, other).score(self._real)[0] > 0)

    def figures(self, scores: Tensor) -> list[tuple[str, float, float]]:
        """Returns name, value and chance level of every metric for a row of scores [unit]."""
        names = ("blank-out", "comprehensiveness", "sufficiency")
        row = scores.double()
        if bool(row[self.others].isnan().any()) or len(self.others) < 2:
            return [(name, float("nan"), float("nan")) for name in names]
        single = torch.tensor(self.falls([[unit] for unit in self.others])).double()
        tied = len(row[self.others].unique()) < len(self.others)
        first, rest = [], []
        for order in self._orders if tied else self._orders[:1]:
            ranked = sorted(order, key=lambda unit: -float(row[unit]))
            first += [ranked[:count] for count in range(1, len(ranked))]
            rest += [ranked[count:] for count in range(1, len(ranked))]
        values = (
            float(spearman(row[self.others], single)),
            _mean(self.falls(first)),
            _mean(self.falls(rest)),
        )
        chance = (0.0, self._random_level(), self._random_level())
        return list(zip(names, values, chance, strict=True))

    def falls(self, sets: Iterable[Sequence[int]]) -> list[float]:
        """Returns the drop in log-probability for each set of blanked units."""
        asked = [frozenset(units) for units in sets]
        new = list(dict.fromkeys(units for units in asked if units not in self._known))
        for start in range(0, len(new), _TOGETHER):
            part = new[start : start + _TOGETHER]
            ids = self._ids.repeat(len(part), 1)
            for row, units in enumerate(part):
                for unit in units:
                    ids[row, slice(*self._units[unit])] = self._blank
            found = self.real - self.answer.repeat(len(part)).score(self._log_probs(ids))
            self._known.update(zip(part, found.tolist(), strict=True))
        return [self._known[units] for units in asked]

    def _random_level(self) -> float:
        """Returns the mean drop over random orders, the chance level of both areas.

        In a random order, blanking the first units and blanking the rest are equivalent.
        """
        if self._random is None:
            cuts = [(order, count) for order in self._orders for count in range(1, len(order))]
            sets = [part for order, count in cuts for part in (order[:count], order[count:])]
            self._random = _mean(self.falls(sets))
        return self._random

    def _log_probs(self, ids: Tensor) -> Tensor:
        side = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        given = self._question.batch.further
        further = {name: value.expand_as(ids) for name, value in given.items()}
        trace = self._view.run(Batch(side, None, further), [self._view.blocks()[0].resid_in])
        assert trace.logits is not None
        logits = trace.logits[:, self.place]
        require_predictions(logits)
        return logits.float().cpu().log_softmax(-1)


def _shuffled(units: Sequence[int], seed: int) -> list[list[int]]:
    """Returns random orders, independent between sentences so that errors average out."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(_ORDERS):
        order = torch.randperm(len(units), generator=generator).tolist()
        result.append([units[index] for index in order])
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def blank_token(model: object, view: ModelView) -> int:
    """Returns the token that replaces blanked ones where none is named, see `faithfulness`."""
    tokenizer = getattr(model, "tokenizer", None)
    for name in ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        # A token added to the tokenizer later is outside the model's vocabulary.
        if isinstance(value, int) and 0 <= value < view.d_vocab:
            return value
    raise InvalidInput(
        "there is no token to blank with",
        "a tokenizer without special tokens, or none",
        "a mask, unknown, padding or end-of-sequence token",
        "Pass blank=<token id>.",
    )
