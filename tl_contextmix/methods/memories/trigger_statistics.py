"""What the triggers of memories say (Geva et al. 2021): agreement, patterns, removed tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs import word_table
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.pieces import join_pieces
from tl_contextmix.core.readout import Unembedding, unembedding
from tl_contextmix.core.validation import require_number
from tl_contextmix.engine.memory_coefficients import (
    require_feed_forward,
    require_predicting,
    values,
)
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.composition import draw
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.miner import NEGATIVE
from tl_contextmix.methods.memories.store import not_mined
from tl_contextmix.methods.memories.trigger_contexts import (
    coefficients_of,
    contexts,
    places_of,
    sample,
)
from tl_contextmix.results import LayerFigures, Pattern, TriggerAgreement, TriggerPatterns

if TYPE_CHECKING:
    import pandas

REMOVED = ("first", "last", "random")
_PREFIXES = 256
_ENDINGS = (3, 2, 1)
_KEPT = 0.5


def sampled(frame: pandas.DataFrame, per_layer: int, k: int, seed: int) -> pandas.DataFrame:
    """Returns the first ``k`` triggers of some memories of each layer, drawn by their numbers."""
    per_layer, k = require_number("per_layer", per_layer), require_number("k", k)
    seed, kept = require_number("seed", seed, 0), []
    for layer, group in frame.groupby("layer"):
        numbers = sorted(set(group["neuron"]))
        order = sorted(numbers, key=lambda n: draw(2**62, seed, int(layer), int(n)))
        kept.append(group[group["neuron"].isin(order[:per_layer]) & (group["rank"] < k)])
    return frame if not kept else frame.loc[[index for part in kept for index in part.index]]


def agreement(triggers: Mined, tail: str) -> TriggerAgreement:
    """Returns the agreement of values and triggers, see `Triggers.agreement`."""
    view = triggers.require_view()
    if triggers.stack != "decoder":
        raise not_mined("next token", triggers.stack, "a model that predicts the next token")
    require_predicting(view, triggers.stack)
    frame = triggers.to_dataframe(tail=tail)
    frame = frame[frame["next_token"] >= 0].sort_values(["layer", "neuron", "rank"], kind="stable")
    reader = unembedding(view.readout, None, ("folded", "head"))
    columns: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for layer, group in frame.groupby("layer"):
            found = _layer(view, int(layer), group, reader, int(tail in NEGATIVE))
            for name, column in found.items():
                columns.setdefault(name, []).append(column)
    if not columns:
        raise not_mined("trigger with a next token", "none", "a longer corpus")
    whole = {name: torch.cat(parts) for name, parts in columns.items()}
    memories = sum(len(some) for some in triggers.manifest["neurons"].values())
    return TriggerAgreement(
        **whole,
        left_out=memories - len(whole["layer"]),
        k=triggers.k,
        words=word_table(view, whole["top"], whole["next_token"]),
        provenance=triggers.describe("agreement", {"tail": tail}),
    )


def _layer(
    view: ModelView, layer: int, group: pandas.DataFrame, reader: Unembedding, side: int
) -> dict[str, Tensor]:
    """Returns the columns of one layer's memories, whose triggers are in order."""
    firsts = group.drop_duplicates("neuron")
    neurons, following = (_numbers(firsts[name]) for name in ("neuron", "next_token"))
    vectors = values(require_feed_forward(view.blocks()[layer]))[neurons.to(view.device)]
    scan = reader.scan(reader.hidden(vectors), targets=following.to(view.device))
    top = scan.ids[:, side, 0].cpu()
    index = torch.searchsorted(neurons, _numbers(group["neuron"]))
    hits = (top[index] == _numbers(group["next_token"])).double()
    count = index.bincount(minlength=len(neurons))
    return {
        "layer": torch.full_like(neurons, layer),
        "neuron": neurons,
        "top": top,
        "next_token": following,
        "rank": scan.rank[:, side].cpu(),
        "max_prob": scan.max_prob[:, side].cpu().double(),
        "precision": index.bincount(hits, minlength=len(neurons)) / count,
        "triggers": count,
    }


def _numbers(column: pandas.Series) -> Tensor:
    return torch.tensor(column.to_numpy()).long()


def patterns(triggers: Mined, tail: str, frame: pandas.DataFrame) -> TriggerPatterns:
    """Returns what triggers of memories have in common, see `Triggers.patterns`."""
    view = triggers.require_view()
    known = contexts(triggers, frame)
    left_out, spaced = triggers.left_out, view.spaced()
    base, rows = Base(sample(triggers), left_out), []
    for (layer, neuron), group in frame.groupby(["layer", "neuron"]):
        # Up to the trigger, even where the model had read on.
        some = [
            tuple(known[place][triggers.frame.ends(known[place])[0] : place[1] + 1])
            for place in places_of(group)
        ]
        some = [context for context in some if context]  # at a beginning-of-sequence token
        for kind, tokens, share in common(some, left_out):
            rows.append(
                Pattern(
                    layer=int(layer),
                    neuron=int(neuron),
                    kind=kind,
                    text=join_pieces([view.to_string(token) for token in tokens], spaced),
                    length=len(tokens),
                    share=share,
                    chance=base.share(kind, tokens),
                    triggers=len(some),
                    contexts=len(set(some)),
                )
            )
    return TriggerPatterns(tuple(rows), triggers.describe("patterns", {"tail": tail}))


class Base:
    """How often patterns occur among all prefixes of some documents.

    Args:
        documents: Their token ids.
        left_out: Tokens at which no prefix ends that counts.
    """

    def __init__(self, documents: list[list[int]], left_out: frozenset[int] = frozenset()) -> None:
        self.endings: Counter[tuple[int, ...]] = Counter()
        self.containing: Counter[int] = Counter()
        self.total = 0
        for text in documents:
            ends = [place for place, token in enumerate(text, 1) if token not in left_out]
            self.total += len(ends)
            for length in _ENDINGS:
                self.endings.update(
                    tuple(text[end - length : end]) for end in ends if end >= length
                )
            firsts: dict[int, int] = {}
            for place, token in enumerate(text, 1):
                firsts.setdefault(token, place)
            # A token is before the last one of every prefix that ends after it.
            for token, place in firsts.items():
                self.containing[token] += len(ends) - bisect_right(ends, place)

    def share(self, kind: str, tokens: tuple[int, ...]) -> float:
        """Returns the share of prefixes with a pattern."""
        found = self.endings[tokens] if kind == "ends with" else self.containing[tokens[0]]
        return found / max(1, self.total)


def common(
    contexts: list[tuple[int, ...]], left_out: frozenset[int] = frozenset()
) -> list[tuple[str, tuple[int, ...], float]]:
    """Returns the patterns of contexts: kind, tokens, share; none but an ending is `left_out`."""
    result = []
    for length in _ENDINGS:
        endings = Counter(c[-length:] for c in contexts if len(c) >= length)
        tokens, count = endings.most_common(1)[0] if endings else ((), 0)
        if length == 1 or count >= _KEPT * len(contexts):
            result.append(("ends with", tokens, count / len(contexts)))
            break
    before = Counter(token for c in contexts for token in set(c[:-1]) - left_out)
    if before:
        token, count = before.most_common(1)[0]
        result.append(("contains", (token,), count / len(contexts)))
    return result


def removal(triggers: Mined, frame: pandas.DataFrame, seed: int) -> LayerFigures:
    """Returns the relative change of coefficients at the triggers of a frame; see `Triggers`."""
    view = triggers.require_view()
    if triggers.both_ways:
        raise InvalidInput(
            "no prefix is defined for this model",
            f"{view.name}, which reads both ways",
            "a causal model",
            "The end of a prefix is the last token only where nothing after it is read.",
        )
    known, every = contexts(triggers, frame), len(frame)
    leads = {place: triggers.frame.ends(ids)[0] for place, ids in known.items()}
    # One token has nothing left.
    frame = frame[[place[1] > leads[place] for place in places_of(frame)]]
    if not len(frame):
        raise not_mined("trigger of two tokens or more", "none", "a longer corpus")
    changes: dict[int, list[list[float]]] = {layer: [] for layer in sorted(set(frame["layer"]))}
    grouped = [*frame.groupby(["document", "position"], sort=True)]
    for start in range(0, len(grouped), _PREFIXES):
        some = grouped[start : start + _PREFIXES]
        pairs = [(int(document), int(pos)) for (document, pos), _ in some]
        rows = [known[pair] for pair in pairs]
        cuts = {
            "whole": rows,
            "first": [_without(known[pair], leads[pair]) for pair in pairs],
            "random": [
                _without(known[pair], leads[pair] + draw(pair[1] + 1 - leads[pair], seed, *pair))
                for pair in pairs
            ],
        }
        blocks = [view.blocks()[layer] for layer in changes]
        found = {n: coefficients_of(view, cut, blocks, last=2) for n, cut in cuts.items()}
        for place, (_, memories) in enumerate(some):
            for layer, neuron in zip(memories["layer"], memories["neuron"], strict=True):
                ends = {name: float(one[place][layer][-1, neuron]) for name, one in found.items()}
                # A causal model has computed the prefix without its last token already.
                ends["last"] = float(found["whole"][place][layer][-2, neuron])
                before = ends["whole"]
                changes[layer].append([(ends[name] - before) / before for name in REMOVED])
    options = {"seed": seed, "triggers": len(frame), "left_out": every - len(frame)}
    means = [torch.tensor(rows, dtype=torch.float64).mean(0) for rows in changes.values()]
    return LayerFigures(
        values=torch.stack(means)[None],
        layers=tuple(changes),
        quantities=REMOVED,
        title="Coefficients without a token of the trigger",
        caption="Relative change of the coefficient at the end of a trigger when its first, last "
        f"or a random token is removed; mean over {len(frame):,} triggers.",
        unit="relative change",
        provenance=triggers.describe("removal", options),
    )


def _without(ids: list[int], place: int) -> list[int]:
    return ids[:place] + ids[place + 1 :]
