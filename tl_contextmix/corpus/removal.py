"""What memories lose when a token of their trigger is removed (Geva et al. 2021, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tl_contextmix.corpus.composition import draw
from tl_contextmix.corpus.shards import frame_of
from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.results import LayerFigures

if TYPE_CHECKING:
    import pandas

    from tl_contextmix.corpus.triggers import Triggers

REMOVED = ("first", "last", "random")


def removal(triggers: Triggers, frame: pandas.DataFrame, seed: int) -> LayerFigures:
    """Returns the relative change of coefficients, see `Triggers.removal`.

    Args:
        triggers: The triggers.
        frame: Those of them that are taken.
        seed: Of the random token.
    """
    view = triggers.view
    assert view is not None
    if "decoder" not in view.stacks or len(view.stacks) == 2:
        raise InvalidInput(
            four_parts(
                "no prefix is defined for this model",
                f"{view.name}, which reads both ways",
                "a causal model",
                "The end of a prefix is the last token only where nothing behind it is read.",
            )
        )
    lead = frame_of(view, triggers.manifest["run"]["options"]["prepend_bos"])[0]
    frame = frame[frame["position"] > lead]  # a prefix of one token has nothing left
    contexts = triggers.contexts(frame)
    pairs = list(dict.fromkeys(zip(frame["document"], frame["position"], strict=True)))
    blocks = [view.blocks()[layer] for layer in sorted(set(frame["layer"]))]
    whole = triggers.coefficients_of([contexts[pair] for pair in pairs], blocks)
    cuts = {
        "first": [contexts[pair][:lead] + contexts[pair][lead + 1 :] for pair in pairs],
        "random": [_without_random(contexts[pair], lead, seed, pair) for pair in pairs],
    }
    cut = {name: triggers.coefficients_of(rows, blocks) for name, rows in cuts.items()}
    index = {pair: place for place, pair in enumerate(pairs)}
    changes: dict[int, list[list[float]]] = {block.layer: [] for block in blocks}
    for row in frame.itertuples():
        place, layer = index[row.document, row.position], row.layer
        before = float(whole[place][layer][-1, row.neuron])
        after = {
            # A causal model has computed the prefix without its last token already.
            "last": float(whole[place][layer][-2, row.neuron]),
            **{name: float(found[place][layer][-1, row.neuron]) for name, found in cut.items()},
        }
        changes[layer].append([(after[name] - before) / before for name in REMOVED])
    means = [torch.tensor(changes[block.layer], dtype=torch.float64).mean(0) for block in blocks]
    return LayerFigures(
        values=torch.stack(means)[None],
        layers=tuple(block.layer for block in blocks),
        quantities=REMOVED,
        title="Coefficients without a token of the trigger",
        caption="Relative change of the coefficient at the end of a trigger when its first, last "
        f"or a random token is removed; mean over {len(frame):,} triggers.",
        unit="relative change",
        provenance=triggers.describe("removal", {"seed": seed, "triggers": len(frame)}),
    )


def _without_random(ids: list[int], lead: int, seed: int, pair: tuple[int, int]) -> list[int]:
    place = lead + draw(len(ids) - lead, seed, *map(int, pair))
    return ids[:place] + ids[place + 1 :]
