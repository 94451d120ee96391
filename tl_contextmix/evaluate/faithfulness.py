"""Are the tokens that a map ranks high those that the prediction rests on?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tl_contextmix.errors import UnsupportedModel, four_parts
from tl_contextmix.evaluate.rows import Figures, bad, per_sentence, summarise, target_place
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Given, Text, make_batch
from tl_contextmix.model_view import Batch, ModelView, Side
from tl_contextmix.ranks import spearman
from tl_contextmix.results import ContextMap, Score

# Sentences of one length with other tokens blanked; so many are run together.
_TOGETHER = 64
_ORDERS = 5


def faithfulness(
    model: object,
    input: Text | Tensor,
    map: ContextMap,
    *,
    target: int | Sequence[int] = -1,
    blank: int | None = None,
    answer: Sequence[int] | None = None,
) -> Score:
    r"""Returns whether the tokens a map ranks high are those the prediction rests on.

    Every real token but the target is replaced by a blank in turn; :math:`\Delta_j` is how much
    the log-probability of the answer falls. Per layer:

    * ``blank-out``: Spearman's correlation of the target's row with :math:`\Delta`.
    * ``comprehensiveness``: mean fall (nats) when the highest-ranked tokens are blanked, one more
      at a time (area under that curve, DeYoung et al. 2020); high for a good map. Chance: the mean
      over random orders.
    * ``sufficiency``: mean fall when only they are kept; low for a good map.

    Args:
        model: A causal or masked language model.
        input: A text, several, or token ids: those the map is of.
        map: A map with one score per pair and layer, with a row for the target.
        target: The position whose prediction is looked at, one for all or one per sentence;
            negative from the last real token. A masked model is asked about this position's own
            token, a causal one about the next.
        blank: Token id that blanks; None for the tokenizer's mask, unknown, padding or end token.
        answer: Token ids of the answers; None for what the model itself predicts.

    Returns:
        A `Score` with 95 % bootstrap intervals over sentences.

    Raises:
        InvalidInput: If the map is of other tokens.
        UnsupportedModel: If the model has no trained vocabulary readout, or two stacks.

    Cost: per sentence of ``n`` tokens ``2 n`` forward passes per layer and ``6 n`` more at most,
    run in batches; sets of tokens that layers share are run once.
    """
    view = as_view(model)
    batch = make_batch(view, Given(input))
    if not torch.equal(batch.main.ids.cpu(), map.source.ids):
        raise bad(
            "the map is of another input",
            str(tuple(map.source.ids.shape)),
            f"the tokens of the input, {tuple(batch.main.ids.shape)}",
            "Give the text or tokens that the map was made of.",
        )
    places = per_sentence(target, len(map.source.strings), "targets")
    drops = [
        blanked(model, ids[mask], place, blank, None if answer is None else answer[row])
        for row, (ids, mask, place) in enumerate(
            zip(map.source.ids, map.source.mask, places, strict=True)
        )
    ]
    return faithfulness_of(map, drops)


def faithfulness_of(maps: ContextMap | Sequence[ContextMap], drops: Sequence[Drop]) -> Score:
    """Returns `faithfulness` from sentences whose blanked predictions may be known already.

    Args:
        maps: One map, or one per sentence.
        drops: The sentences; what has been measured for another map is not measured again.
    """
    found: Figures = {}
    listed = [maps] if isinstance(maps, ContextMap) else maps
    rows = [(map, row) for map in listed for row in range(len(map.target.strings))]
    for (map, row), drop in zip(rows, drops, strict=True):
        real = map.source.mask[row].nonzero()[:, 0]
        index = _row_of(map, row, drop, int(real[0]))
        for layer, label in enumerate(map.layer_names):
            scores = map.scores[row, layer, 0, index].cpu()[real]
            for metric, value, chance in drop.figures(scores):
                found.setdefault((label, metric), []).append((value, chance))
    return Score(
        rows=summarise(listed[0].provenance.method, found),
        title="Faithfulness",
        caption="Falls of the answer's log-probability (nats) when tokens are blanked. "
        "Comprehensiveness: higher is better; sufficiency: lower is better.",
    )


def _row_of(map: ContextMap, row: int, drop: Drop, start: int) -> int:
    """Returns the row of the target; a map of one row per sentence (gradients) is of that one."""
    if map.target.ids.shape[1] == 1:
        return 0
    return target_place(map, row, drop.place + start)


def blanked(model: object, ids: Tensor, target: int, blank: int | None, answer: int | None) -> Drop:
    """Returns a sentence whose tokens can be blanked.

    Args:
        model: A causal or masked language model.
        ids: Its tokens [pos], no padding.
        target: See `faithfulness`.
        blank: See `faithfulness`.
        answer: See `faithfulness`.
    """
    view = as_view(model)
    view.readout.require()
    if len(view.stacks) == 2:
        raise UnsupportedModel(
            four_parts(
                "tokens of an encoder-decoder are not blanked",
                f"{view.name}, a model of two stacks",
                "a causal or a masked language model",
                "Compare its maps by cue_alignment or agreement.",
            )
        )
    if not -len(ids) <= target < len(ids):
        raise bad(
            "this target is no token",
            str(target),
            f"from {-len(ids)} to {len(ids) - 1}",
            "Positions count all tokens, a beginning-of-sequence token included.",
        )
    token = _blank_token(model, view) if blank is None else blank
    if not 0 <= token < view.d_vocab:
        raise bad(
            "this token cannot blank another",
            f"token id {token}",
            f"an id from 0 to {view.d_vocab - 1}",
            "Give blank=<token id>.",
        )
    return Drop(view, ids.cpu(), target % len(ids), token, answer)


class Drop:
    """How much an answer's log-probability falls when tokens of a sentence are blanked.

    Attributes:
        place: The position of the prediction.
        others: All other positions that it can depend on.
        answer: Id of the answer.
        real: Its log-probability with nothing blanked.
    """

    def __init__(
        self, view: ModelView, ids: Tensor, place: int, blank: int, answer: int | None
    ) -> None:
        self._view, self._ids, self._blank = view, ids, blank
        self.place = place
        # What a causal model has not read yet cannot matter.
        length = place if "decoder" in view.stacks else len(ids)
        self.others = [index for index in range(length) if index != place]
        self._real = self._log_probs(ids[None])[0]
        self.answer = int(self._real.argmax()) if answer is None else answer
        self.real = self.log_prob(self.answer)
        self._known: dict[frozenset[int], float] = {frozenset(): 0.0}
        self._random: float | None = None

    def log_prob(self, token: int) -> float:
        """Returns the log-probability of a token with nothing blanked."""
        return float(self._real[token])

    def figures(self, scores: Tensor) -> list[tuple[str, float, float]]:
        """Returns name, value and chance level of every figure about a row of scores [pos]."""
        order = scores[self.others].argsort(descending=True, stable=True)
        ranked = [self.others[index] for index in order.tolist()]
        first = [ranked[:count] for count in range(1, len(ranked))]
        rest = [ranked[count:] for count in range(1, len(ranked))]
        single = torch.tensor(self.falls([[place] for place in self.others])).double()
        return [
            ("blank-out", float(spearman(scores[self.others].double(), single)), 0.0),
            ("comprehensiveness", _mean(self.falls(first)), self._random_level()),
            ("sufficiency", _mean(self.falls(rest)), self._random_level()),
        ]

    def falls(self, sets: Iterable[Sequence[int]]) -> list[float]:
        """Returns how much the log-probability falls for each set of blanked positions."""
        asked = [frozenset(places) for places in sets]
        new = list(dict.fromkeys(places for places in asked if places not in self._known))
        for start in range(0, len(new), _TOGETHER):
            part = new[start : start + _TOGETHER]
            ids = self._ids.repeat(len(part), 1)
            for row, places in enumerate(part):
                ids[row, list(places)] = self._blank
            found = self.real - self._log_probs(ids)[:, self.answer]
            self._known.update(zip(part, found.tolist(), strict=True))
        return [self._known[places] for places in asked]

    def _random_level(self) -> float:
        """Returns the mean fall along random orders: the chance level of both areas.

        Blanking the first of a random order and keeping them are the same thing.
        """
        if self._random is None:
            generator = torch.Generator().manual_seed(0)
            sets = []
            for _ in range(_ORDERS):
                order = torch.randperm(len(self.others), generator=generator).tolist()
                places = [self.others[index] for index in order]
                sets += [places[:count] for count in range(1, len(places))]
            self._random = _mean(self.falls(sets))
        return self._random

    def _log_probs(self, ids: Tensor) -> Tensor:
        side = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        trace = self._view.run(Batch(main=side), [self._view.blocks()[0].resid_in])
        assert trace.logits is not None
        return trace.logits[:, self.place].float().cpu().log_softmax(-1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _blank_token(model: object, view: ModelView) -> int:
    tokenizer = getattr(model, "tokenizer", None)
    for name in ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        # A token that was added to the tokenizer later lies outside of the model's vocabulary.
        if isinstance(value, int) and 0 <= value < view.d_vocab:
            return value
    raise bad(
        "nothing can be blanked",
        "a model without a tokenizer that has such a token",
        "a mask, unknown, padding or end token",
        "Give blank=<token id>.",
    )
