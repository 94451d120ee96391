"""Contexts of triggers, fetched from the corpus, and what memories do along them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs import Given, make_batch, pad_rows
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.readout import unembedding
from tl_contextmix.engine.memory_coefficients import require_feed_forward, values
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.memories.corpus_formats import Document
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.miner import NEGATIVE
from tl_contextmix.methods.memories.shards import cut, encode
from tl_contextmix.results import Trigger, TriggerExamples
from tl_contextmix.results.storage import replacing

if TYPE_CHECKING:
    import pandas

Place = tuple[int, int]
_BATCH, _SAMPLE, _PROMOTED = 16, 1000, 10
_SHEET = (
    *("layer", "neuron", "rank", "value", "document", "position"),
    *("context", "token", "next_token"),
    *("pattern_1", "pattern_2", "pattern_3", "pattern_4", "note"),
)
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def places_of(frame: pandas.DataFrame) -> list[Place]:
    """Returns document and position of each row."""
    return list(zip(frame["document"].tolist(), frame["position"].tolist(), strict=True))


def contexts(triggers: Mined, frame: pandas.DataFrame) -> dict[Place, list[int]]:
    """Returns the token ids that the model had read at triggers, by document and position.

    Those up to the trigger; where the model reads both ways the whole document.
    """
    picked = _picked(triggers, set(frame["document"].tolist()))
    ids = {number: _as_mined(triggers, document) for number, document in picked.items()}
    result, hashes = {}, frame.get("hash", frame["document"].map(lambda _: None))
    for place, token, mined in zip(places_of(frame), frame["token"], hashes, strict=True):
        document, position = place
        whole = ids[document]
        # Version 0.1.0 wrote no hashes: the token at the trigger has to do.
        other = mined is not None and picked[document].hash() != mined
        if other or position >= len(whole) or whole[position] != token:
            raise InvalidInput(
                f"document {document} is not the one that was mined",
                f"another text in {triggers.require_corpus().name}",
                f"the text whose token {token} is at position {position}",
                "Pass the corpus that was mined with load_triggers(..., corpus=...).",
            )
        result[place] = whole if triggers.both_ways else whole[: position + 1]
    return result


def _picked(triggers: Mined, needed: set[int], spare: Iterable[int] = ()) -> dict[int, Document]:
    triggers.require_view()
    return triggers.require_corpus().pick(needed, spare)


def _as_mined(triggers: Mined, document: Document) -> list[int]:
    """Returns the token ids of a document, cut off where they were."""
    view, ids = triggers.require_view(), encode(triggers.require_view(), document, triggers.bos)
    return cut(view, ids, triggers.frame)


def sample(triggers: Mined) -> list[list[int]]:
    """Returns the token ids of up to a thousand documents of the corpus, always the same ones.

    Without the tokens that frame them, and without documents that were not mined.
    """
    view, total, result = triggers.require_view(), triggers.manifest["counts"]["documents"], []
    drawn = random.Random(0).sample(range(total), min(_SAMPLE, total))
    whole = triggers.manifest["run"]["options"]["too_long"] != "cut"
    for document in _picked(triggers, set(), drawn).values():
        ids = _as_mined(triggers, document)
        before, after = triggers.frame.ends(ids)
        if whole and len(ids) < len(encode(view, document, triggers.bos)):
            continue
        if max(ids, default=0) >= view.d_vocab:
            continue
        if len(ids) > before + after:
            result.append(ids[before : len(ids) - after])
    return result


def coefficients_of(
    view: ModelView, rows: list[list[int]], blocks: Sequence[Block], *, last: int = 0
) -> list[dict[int, Tensor]]:
    """Returns the coefficients [pos neuron] of layers along sequences of token ids.

    ``last`` is how many positions at the end are kept; 0 for all.
    """
    result: list[dict[int, Tensor]] = []
    names = [require_feed_forward(block).post for block in blocks]
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        side = pad_rows(some, view.pad_id())
        with torch.no_grad():
            batch = make_batch(view, Given(side.ids, attention_mask=side.mask))
            trace = view.run(batch, names, logits=False)
            layers = {b.layer: require_feed_forward(b).coefficients(trace) for b in blocks}
        result += [
            {layer: one[index, : len(row)][-last:].cpu() for layer, one in layers.items()}
            for index, row in enumerate(some)
        ]
    return result


def examples(
    triggers: Mined, block: Block, neuron: int, tail: str, frame: pandas.DataFrame
) -> TriggerExamples:
    """Returns triggers of a memory, the rows of a frame, with contexts; see `Triggers.examples`."""
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
            spaced=view.spaced(),
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
    words = tuple(view.to_output(token) for token in scan.ids[0, 0].tolist())
    return words, tuple(scan.ends[0, 0].tolist())


def write_jsonl(triggers: Mined, path: Path, frame: pandas.DataFrame) -> Path:
    """Writes activations as Neuronpedia's exporter has them; see `Triggers.to_jsonl`."""
    view = triggers.require_view()
    name = triggers.manifest["run"]["model"]
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with _written(path) as part, opener(part, "wt", encoding="utf-8") as file:
        for layer, group in frame.groupby("layer"):
            block = view.stacks[triggers.stack][int(layer)]
            known = contexts(triggers, group)
            found = coefficients_of(view, list(known.values()), [block])
            along = dict(zip(known, found, strict=True))
            for place, row in zip(places_of(group), group.itertuples(), strict=True):
                values = along[place][int(layer)][:, row.neuron].tolist()
                record = {
                    "modelId": name,
                    "layer": f"{layer}-mlp",
                    "index": str(row.neuron),
                    "tokens": [view.to_string(token) for token in known[place]],
                    "values": values,
                    "maxValue": max(values),
                    "maxValueTokenIndex": max(range(len(values)), key=values.__getitem__),
                    "minValue": min(values),
                    "dataIndex": str(row.document),
                    "qualifyingTokenIndex": int(row.position),
                    "binContains": None,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def write_sheet(triggers: Mined, path: Path, frame: pandas.DataFrame) -> Path:
    """Writes an annotation sheet; see `Triggers.to_sheet`."""
    view = triggers.require_view()
    known = contexts(triggers, frame)
    with _written(path) as part, open(part, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_SHEET)
        for place, row in zip(places_of(frame), frame.itertuples(), strict=True):
            text = view.to_text(known[place])
            following = "" if row.next_token < 0 else view.to_string(int(row.next_token))
            numbers = (row.layer, row.neuron, row.rank, row.value, row.document, row.position)
            words = (text, view.to_string(int(row.token)), following)
            writer.writerow([*numbers, *map(_plain, words), *[""] * 5])
    return path


def _plain(text: str) -> str:
    """Returns text that a spreadsheet shows and does not run."""
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Yields where to write: the file takes its name once it is complete."""
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written",
            str(error),
            "a file in a folder that exists, with room",
            "Choose another path.",
        ) from error
