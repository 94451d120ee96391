"""Contexts of triggers, fetched from the corpus, and what memories do along them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.memory_coefficients import require_feed_forward
from tl_contextmix.errors import bad
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.shards import cut, frame_of

if TYPE_CHECKING:
    import pandas


Place = tuple[int, int]
_BATCH = 16
_SAMPLE = 1000


def places_of(frame: pandas.DataFrame) -> list[Place]:
    """Returns document and position of each row."""
    return list(zip(frame["document"].tolist(), frame["position"].tolist(), strict=True))


def contexts(triggers: Mined, frame: pandas.DataFrame) -> dict[Place, list[int]]:
    """Returns the token ids that the model had read at triggers, by document and position.

    Those up to the trigger; where the model reads both ways the whole document.

    Raises:
        InvalidInput: If model or corpus are not at hand, or the corpus has changed.
    """
    ids = documents(triggers, frame["document"])
    found = {}
    for place, token in zip(places_of(frame), frame["token"], strict=True):
        document, position = place
        whole = ids[document]
        if position >= len(whole) or whole[position] != token:
            raise bad(
                "the corpus is not the one that was mined",
                f"another token at position {position} of document {document}",
                f"token {token}",
                "Give the corpus of then with load_triggers(..., corpus=...).",
            )
        found[place] = whole if triggers.both_ways else whole[: position + 1]
    return found


def documents(
    triggers: Mined, numbers: Iterable[int], spare: Iterable[int] = ()
) -> dict[int, list[int]]:
    """Returns the token ids of documents, as they were mined.

    Args:
        triggers: The triggers.
        numbers: The documents.
        spare: Further ones, which are left out if they were.

    Raises:
        InvalidInput: If model or corpus are not at hand, or the corpus has changed.
    """
    view, options = triggers.require_view(), triggers.manifest["run"]["options"]
    if triggers.corpus is None:
        raise bad(
            "contexts cannot be shown",
            "no corpus",
            "the corpus that was mined",
            "Call load_triggers(folder, model=..., corpus=...).",
        )
    before, behind = frame_of(view, options["prepend_bos"])
    needed = set(map(int, numbers))
    found = {}
    for number, text in triggers.corpus.pick(needed, spare).items():
        ids = view.encode(text, options["prepend_bos"])
        kept = cut(view, ids, behind)
        mined = len(ids) > before + behind and (kept == ids or options["too_long"] == "cut")
        if number in needed or mined:
            found[number] = kept
    return found


def sample(triggers: Mined) -> dict[int, list[int]]:
    """Returns the token ids of up to a thousand documents of the corpus, always the same ones.

    Without the tokens that frame every text.
    """
    total = triggers.manifest["counts"]["documents"]
    drawn = random.Random(0).sample(range(total), min(_SAMPLE, total))
    prepend = triggers.manifest["run"]["options"]["prepend_bos"]
    before, behind = frame_of(triggers.require_view(), prepend)
    found = documents(triggers, (), drawn)
    return {number: ids[before : len(ids) - behind] for number, ids in found.items()}


def coefficients_of(
    view: ModelView, rows: list[list[int]], blocks: Sequence[Block], *, last: int = 0
) -> list[dict[int, Tensor]]:
    """Returns the coefficients [pos neuron] of layers along sequences of token ids.

    Args:
        view: The model.
        rows: The sequences.
        blocks: The layers.
        last: How many positions at the end are kept; 0 for all.
    """
    found: list[dict[int, Tensor]] = []
    names = [require_feed_forward(block).post for block in blocks]
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        longest = max(map(len, some))
        ids = torch.full((len(some), longest), view.pad_id(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(some):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        with torch.no_grad():
            trace = view.run(make_batch(view, Given(ids, attention_mask=mask)), names)
            layers = {b.layer: require_feed_forward(b).coefficients(trace) for b in blocks}
        found += [
            {layer: one[index, : len(row)][-last:].cpu() for layer, one in layers.items()}
            for index, row in enumerate(some)
        ]
    return found
