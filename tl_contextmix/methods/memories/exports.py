"""Triggers for other tools and for human annotators."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_contextmix.errors import bad
from tl_contextmix.methods.memories.mined import Mined
from tl_contextmix.methods.memories.trigger_contexts import coefficients_of, contexts, places_of
from tl_contextmix.results.storage import replacing

if TYPE_CHECKING:
    import pandas


_SHEET = (
    *("layer", "neuron", "rank", "value", "document", "position"),
    *("context", "token", "next_token"),
    *("pattern_1", "pattern_2", "pattern_3", "pattern_4", "note"),
)
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


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
            text = "".join(view.to_string(token) for token in known[place])
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
        raise bad(
            f"{path} cannot be written",
            str(error),
            "a file in a folder that exists, with room",
            "Choose another path.",
        ) from error
