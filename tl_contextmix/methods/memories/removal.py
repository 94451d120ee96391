"""What memories lose when a token of their trigger is removed (Geva et al. 2021, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tl_contextmix.errors import bad
from tl_contextmix.methods.memories.composition import draw
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.shards import frame_of
from tl_contextmix.methods.memories.store import not_mined
from tl_contextmix.methods.memories.trigger_contexts import coefficients_of, contexts
from tl_contextmix.results import LayerFigures

if TYPE_CHECKING:
    import pandas


REMOVED = ("first", "last", "random")
_PREFIXES = 256


def removal(triggers: Mined, frame: pandas.DataFrame, seed: int) -> LayerFigures:
    """Returns the relative change of coefficients, see `Triggers.removal`.

    Args:
        triggers: The triggers.
        frame: Those of them that are taken.
        seed: Of the random token.
    """
    view = triggers.require_view()
    if triggers.both_ways:
        raise bad(
            "no prefix is defined for this model",
            f"{view.name}, which reads both ways",
            "a causal model",
            "The end of a prefix is the last token only where nothing behind it is read.",
        )
    lead = frame_of(view, triggers.manifest["run"]["options"]["prepend_bos"])[0]
    every, frame = len(frame), frame[frame["position"] > lead]  # one token has nothing left
    if not len(frame):
        raise not_mined("trigger of two tokens or more", "none", "a longer corpus")
    known = contexts(triggers, frame)
    changes: dict[int, list[list[float]]] = {layer: [] for layer in sorted(set(frame["layer"]))}
    grouped = [*frame.groupby(["document", "position"], sort=True)]
    for start in range(0, len(grouped), _PREFIXES):
        some = grouped[start : start + _PREFIXES]
        pairs = [(int(document), int(pos)) for (document, pos), _ in some]
        rows = [known[pair] for pair in pairs]
        cuts = {
            "whole": rows,
            "first": [row[:lead] + row[lead + 1 :] for row in rows],
            "random": [
                _without_random(row, lead, seed, pair)
                for row, pair in zip(rows, pairs, strict=True)
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


def _without_random(ids: list[int], lead: int, seed: int, pair: tuple[int, int]) -> list[int]:
    place = lead + draw(len(ids) - lead, seed, *map(int, pair))
    return ids[:place] + ids[place + 1 :]
