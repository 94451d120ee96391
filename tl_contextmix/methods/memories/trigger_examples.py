"""The triggers of one memory with their contexts, and what it promotes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tl_contextmix.core.blocks import Block
from tl_contextmix.core.readout import unembedding
from tl_contextmix.engine.memory_coefficients import require_feed_forward, values
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.miner import NEGATIVE
from tl_contextmix.methods.memories.trigger_contexts import coefficients_of, contexts, places_of
from tl_contextmix.results import Trigger, TriggerExamples

if TYPE_CHECKING:
    import pandas


_PROMOTED = 10


def examples(
    triggers: Mined, block: Block, neuron: int, tail: str, frame: pandas.DataFrame
) -> TriggerExamples:
    """Returns triggers of a memory with their contexts, see `Triggers.examples`.

    Args:
        triggers: All triggers.
        block: The memory's layer.
        neuron: Its neuron.
        tail: What was looked for.
        frame: Its triggers.
    """
    view = triggers.require_view()
    known = contexts(triggers, frame)
    rows = [known[place] for place in places_of(frame)]
    seen = coefficients_of(view, rows, [block])
    found = [
        Trigger(
            rank=int(row.rank),
            value=float(row.value),
            document=int(row.document),
            position=int(row.position),
            tokens=tuple(view.to_string(one) for one in ids),
            activations=tuple(along[block.layer][:, neuron].tolist()),
            next_token="" if row.next_token < 0 else view.to_string(int(row.next_token)),
        )
        for row, ids, along in zip(frame.itertuples(), rows, seen, strict=True)
    ]
    words, logits = _promotes(triggers, block, neuron, tail in NEGATIVE)
    where = triggers.describe("examples", {"tail": tail})
    return TriggerExamples(block.layer, neuron, tail, tuple(found), words, logits, where)


def _promotes(
    triggers: Mined, block: Block, neuron: int, negative: bool
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    view = triggers.require_view()
    if view.readout.refusal or triggers.stack != view.base_stack(None):
        return (), ()
    reader = unembedding(view.readout, None, ("folded", "head"))
    with torch.no_grad():
        vector = values(require_feed_forward(block))[neuron : neuron + 1]
        vector = -vector if negative else vector
        scan = reader.scan(reader.hidden(vector), _PROMOTED, sides=1)
    words = tuple(view.to_string(token) for token in scan.ids[0, 0].tolist())
    return words, tuple(scan.ends[0, 0].tolist())
