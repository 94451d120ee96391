"""Is the map right? Agreement with known cues, with what the model does, and between maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Given, Text, make_batch
from tl_contextmix.model_view import Batch, ModelView, Side
from tl_contextmix.ranks import (
    average_precision,
    bootstrap_interval,
    expected_average_precision,
    kendall,
    spearman,
)
from tl_contextmix.results import ContextMap, Score, ScoreRow

Maps = ContextMap | Sequence[ContextMap]
_ROW = Callable[[Tensor, Tensor], Tensor]


def cue_alignment(
    maps: Maps,
    cues: Sequence[Sequence[int]],
    *,
    targets: Sequence[int] | int = -1,
    method: str | None = None,
) -> Score:
    r"""Returns how much a map's target rows point at the tokens that decide the target.

    Two figures per layer, means over sentences (Mohebbi et al. 2023, section 5):

    * ``dot``: :math:`\sum_{j \in cues} C_{ij}` of a row that sums to 1. Chance: the share of
      readable tokens that are cues.
    * ``average precision`` of ranking the readable tokens by score. Chance: that of a random order.

    Args:
        maps: One map with a row of the batch per sentence, or one map per sentence. Rows must sum
            to 1 (`ContextMap.normalize`), as they do for attention weights.
        cues: Per sentence the source positions that decide the target; several are fine.
        targets: The target position, one for all or one per sentence; negative counts from the
            last real token.
        method: Name in the table; None for the map's own.

    Returns:
        A `Score`: value, 95 % bootstrap interval over sentences and chance level per layer.

    Raises:
        InvalidInput: If a cue or target is no real token, or rows do not sum to 1.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    sentences = list(_sentences(maps))
    _require_cues(sentences, cues)
    name = method
    for index, (map, row) in enumerate(sentences):
        name = name or map.provenance.method
        place = _target(map, row, targets if isinstance(targets, int) else targets[index])
        readable = _readable(map, row, place)
        relevant = torch.zeros_like(readable)
        relevant[[_cue(map, row, cue, readable) for cue in cues[index]]] = True
        items, hits = int(readable.sum()), int(relevant.sum())
        for layer, label in _layers(map):
            scores = map.scores[row, layer, 0, place].cpu()
            _require_distribution(scores, map)
            dot = float(scores[relevant].sum())
            precision = float(average_precision(scores[readable], relevant[readable]))
            found.setdefault((label, "dot"), []).append((dot, hits / items))
            chance = expected_average_precision(items, hits)
            found.setdefault((label, "average precision"), []).append((precision, chance))
    return Score(
        rows=tuple(_summary(name or "", key, pairs) for key, pairs in found.items()),
        title="Alignment with the cue",
        caption="How much of the target's row, and how high in its ranking, are the tokens that "
        "decide it. Chance: rows without information.",
    )


def agreement(a: Maps, b: Maps) -> Score:
    """Returns how far two maps order the sources of a target alike.

    Per layer, over the rows that have at least two readable sources and an order in both maps:
    Spearman's rank correlation and Kendall's tau-b, averaged first over the rows of a sentence,
    then over sentences. Chance is 0 for both.

    Args:
        a: One map, or one per sentence.
        b: The other, over the same tokens and layers.

    Raises:
        InvalidInput: If the maps are of different tokens or layers.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    name = ""
    for (first, row), (second, other) in zip(_sentences(a), _sentences(b), strict=True):
        _require_same(first, second)
        name = f"{first.provenance.method} / {second.provenance.method}"
        for layer, label in _layers(first):
            for metric, statistic in (("Spearman", spearman), ("Kendall", kendall)):
                value = _row_mean(first, second, (row, other), layer, statistic)
                found.setdefault((label, metric), []).append((value, 0.0))
    return Score(
        rows=tuple(_summary(name, key, pairs) for key, pairs in found.items()),
        title="Agreement between maps",
        caption="Rank correlation of the sources of each target, averaged. 0: no agreement.",
    )


def faithfulness(
    model: object,
    input: Text | Tensor,
    map: ContextMap,
    *,
    target: int = -1,
    blank: int | None = None,
    answer: Sequence[int] | None = None,
) -> Score:
    r"""Returns whether the tokens a map ranks high are those the prediction rests on.

    Every real token but the target is replaced by a blank in turn; :math:`\Delta_j` is how much
    the log-probability of the answer falls. Per layer:

    * ``blank-out``: Spearman's correlation of the target's row with :math:`\Delta`.
    * ``comprehensiveness``: mean fall when the highest-ranked tokens are blanked, one more at a
      time (area under that curve); high for a good map. Chance: the mean over random orders.
    * ``sufficiency``: mean fall when only they are kept; low for a good map.

    Args:
        model: A causal or masked language model.
        input: A text, several, or token ids: those the map is of.
        map: A map with one score per pair and layer.
        target: The position whose prediction is looked at; negative from the last real token. A
            masked model is asked about this position's own token, a causal one about the next.
        blank: Token id that blanks; None for the tokenizer's unknown, mask or padding token.
        answer: Token ids of the answers; None for what the model itself predicts.

    Returns:
        A `Score` with 95 % bootstrap intervals over sentences.

    Raises:
        InvalidInput: If the map is of other tokens.
        UnsupportedModel: If the model has no trained vocabulary readout.

    Cost: per sentence of ``n`` tokens ``3 n`` forward passes per layer at most, batched.
    """
    view = as_view(model)
    view.readout.require()
    batch = make_batch(view, Given(input))
    if not torch.equal(batch.main.ids.cpu(), map.target.ids):
        raise _bad(
            "the map is of another input",
            str(tuple(map.target.ids.shape)),
            f"the tokens of the input, {tuple(batch.main.ids.shape)}",
        )
    token = _blank(model, blank)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in range(len(map.target.strings)):
        place = _target(map, row, target)
        ids = batch.main.ids[row][batch.main.mask[row]].cpu()
        start = int(map.target.mask[row].nonzero()[0])
        drop = _Drop(view, ids, place - start, token, None if answer is None else answer[row])
        single = torch.tensor([drop([j]) for j in drop.others])
        random = _random_level(drop)
        for layer, label in _layers(map):
            scores = map.scores[row, layer, 0, place].cpu()[start : start + len(ids)]
            ranked = [drop.others[i] for i in scores[drop.others].argsort(descending=True)]
            correlation = float(spearman(scores[drop.others].double(), single.double()))
            kept = [[j for j in ranked if j not in ranked[:k]] for k in range(1, len(ranked))]
            for metric, value, chance in (
                ("blank-out", correlation, 0.0),
                (
                    "comprehensiveness",
                    _mean(drop, [ranked[:k] for k in range(1, len(ranked))]),
                    random,
                ),
                ("sufficiency", _mean(drop, kept), random),
            ):
                found.setdefault((label, metric), []).append((value, chance))
    return Score(
        rows=tuple(_summary(map.provenance.method, key, pairs) for key, pairs in found.items()),
        title="Faithfulness",
        caption="Falls of the answer's log-probability (nats) when tokens are blanked. "
        "Comprehensiveness: higher is better; sufficiency: lower is better.",
    )


class _Drop:
    """How much an answer's log-probability falls when tokens of a sentence are blanked."""

    def __init__(
        self, view: ModelView, ids: Tensor, place: int, blank: int, answer: int | None
    ) -> None:
        self.view, self.ids, self.place, self.blank = view, ids, place, blank
        self.others = [index for index in range(len(ids)) if index != place]
        real = self._log_probs(ids[None])[0]
        self.answer = int(real.argmax()) if answer is None else answer
        self.real = float(real[self.answer])
        self.known: dict[tuple[int, ...], float] = {(): 0.0}

    def _log_probs(self, ids: Tensor) -> Tensor:
        side = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        trace = self.view.run(Batch(main=side), [self.view.blocks()[0].resid_in])
        assert trace.logits is not None
        return trace.logits[:, self.place].float().cpu().log_softmax(-1)

    def __call__(self, blanked: Sequence[int]) -> float:
        key = tuple(sorted(blanked))
        if key not in self.known:
            ids = self.ids.clone()
            ids[list(key)] = self.blank
            self.known[key] = self.real - float(self._log_probs(ids[None])[0, self.answer])
        return self.known[key]


def _mean(drop: _Drop, sets: Sequence[Sequence[int]]) -> float:
    return sum(drop(blanked) for blanked in sets) / len(sets) if sets else float("nan")


def _random_level(drop: _Drop, orders: int = 5) -> float:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(orders):
        order = [drop.others[i] for i in torch.randperm(len(drop.others), generator=generator)]
        found.append(_mean(drop, [order[:k] for k in range(1, len(order))]))
    return sum(found) / len(found)


def _blank(model: object, blank: int | None) -> int:
    if blank is not None:
        return blank
    tokenizer = getattr(model, "tokenizer", None)
    for name in ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise _bad("nothing can be blanked", "a model without a tokenizer", "blank=<token id>")


def _summary(method: str, key: tuple[str, str], pairs: Sequence[tuple[float, float]]) -> ScoreRow:
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    low, high = bootstrap_interval(values)
    chance = sum(level for _, level in pairs) / len(pairs)
    mean = float(values[~values.isnan()].mean())
    return ScoreRow(method, key[0], key[1], mean, low, high, chance, len(pairs))


def _sentences(maps: Maps) -> Iterator[tuple[ContextMap, int]]:
    for map in [maps] if isinstance(maps, ContextMap) else maps:
        if len(map.heads) != 1:
            raise _bad("this map has several heads", f"{len(map.heads)} heads", "one per layer")
        for row in range(len(map.target.strings)):
            yield map, row


def _layers(map: ContextMap) -> list[tuple[int, str]]:
    prefix = "rollout " if "rollout" in map.unit else ""
    return [(index, f"{prefix}{layer}") for index, layer in enumerate(map.layers)]


def _target(map: ContextMap, row: int, target: int) -> int:
    real = map.target.mask[row].nonzero()[:, 0].tolist()
    if target >= 0 and target in real:
        return target
    if -len(real) <= target < 0:
        return real[target]
    raise _bad("this target is no token", str(target), f"one of {real}, or counted from the end")


def _readable(map: ContextMap, row: int, place: int) -> Tensor:
    readable = map.source.mask[row].clone()
    if map.causal:
        readable[place + 1 :] = False
    return readable


def _cue(map: ContextMap, row: int, cue: int, readable: Tensor) -> int:
    if not 0 <= cue < len(readable) or not bool(readable[cue]):
        raise _bad(
            "a cue names no token that can be read",
            f"position {cue} in sentence {row}",
            f"one of {readable.nonzero()[:, 0].tolist()}",
        )
    return cue


def _require_cues(sentences: Sequence[object], cues: Sequence[Sequence[int]]) -> None:
    if len(cues) != len(sentences) or not all(len(positions) for positions in cues):
        raise _bad(
            "cues and sentences do not fit each other",
            f"{len(cues)} lists of cues for {len(sentences)} sentences",
            "at least one cue for every sentence",
        )


def _require_distribution(scores: Tensor, map: ContextMap) -> None:
    total = float(scores.sum())
    # Rows of float32 attention sum to 1 within 1e-6; rows of zeros stay zero when normalised.
    if total != 0 and abs(total - 1) > 1e-3:
        raise _bad(
            "the dot product needs rows that sum to 1",
            f"a row of {map.provenance.method} that sums to {total:.3g}",
            "map.normalize()",
        )


def _require_same(a: ContextMap, b: ContextMap) -> None:
    if not torch.equal(a.target.ids, b.target.ids) or a.layers != b.layers:
        raise _bad(
            "the maps are not of the same tokens and layers",
            f"shapes {tuple(a.scores.shape)} and {tuple(b.scores.shape)}",
            "two maps of one input",
        )


def _row_mean(
    a: ContextMap, b: ContextMap, rows: tuple[int, int], layer: int, statistic: _ROW
) -> float:
    values = []
    for place in a.target.mask[rows[0]].nonzero()[:, 0].tolist():
        readable = _readable(a, rows[0], place)
        pair = (
            a.scores[rows[0], layer, 0, place].cpu()[readable].double(),
            b.scores[rows[1], layer, 0, place].cpu()[readable].double(),
        )
        if len(pair[0]) > 1:
            values.append(statistic(*pair))
    found = torch.stack(values) if values else torch.full((1,), torch.nan)
    return float(found[~found.isnan()].mean())


def _bad(failed: str, seen: str, expected: str) -> InvalidInput:
    return InvalidInput(
        four_parts(failed, seen, expected, "See the docstring of tl_contextmix.evaluate.")
    )
