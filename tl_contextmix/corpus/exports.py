"""Triggers for other tools and for human annotators."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tl_contextmix.corpus.composition import draw
from tl_contextmix.errors import InvalidInput, four_parts

if TYPE_CHECKING:
    import pandas

    from tl_contextmix.corpus.triggers import Triggers

_SHEET = (
    *("layer", "neuron", "rank", "value", "document", "position", "context", "next_token"),
    *("pattern_1", "pattern_2", "pattern_3", "pattern_4", "note"),
)
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_jsonl(triggers: Triggers, path: Path, frame: pandas.DataFrame) -> Path:
    """Writes activations as Neuronpedia's exporter has them; see `Triggers.to_jsonl`."""
    view = triggers.view
    assert view is not None
    name = triggers.manifest["run"]["model"]
    opener = gzip.open if path.suffix == ".gz" else open
    with _written(path), opener(path, "wt", encoding="utf-8") as file:
        for layer, group in frame.groupby("layer"):
            block = view.stacks[triggers.stack][int(layer)]
            contexts = triggers.contexts(group)
            pairs = list(dict.fromkeys(zip(group["document"], group["position"], strict=True)))
            found = triggers.coefficients_of([contexts[pair] for pair in pairs], [block])
            known = dict(zip(pairs, found, strict=True))
            for row in group.itertuples():
                pair = (row.document, row.position)
                values = known[pair][int(layer)][:, row.neuron].tolist()
                record = {
                    "modelId": name,
                    "layer": f"{layer}-mlp",
                    "index": str(row.neuron),
                    "tokens": [view.to_string(token) for token in contexts[pair]],
                    "values": values,
                    "maxValue": max(values),
                    "maxValueTokenIndex": max(range(len(values)), key=values.__getitem__),
                    "minValue": min(values),
                    "dataIndex": str(row.document),
                    "binContains": None,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def write_sheet(triggers: Triggers, path: Path, frame: pandas.DataFrame) -> Path:
    """Writes an annotation sheet; see `Triggers.to_sheet`."""
    view = triggers.view
    assert view is not None
    contexts = triggers.contexts(frame)
    with _written(path), open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_SHEET)
        for row in frame.itertuples():
            ids = contexts[row.document, row.position]
            text = "".join(view.to_string(token) for token in ids)
            following = "" if row.next_token < 0 else view.to_string(int(row.next_token))
            numbers = (row.layer, row.neuron, row.rank, row.value, row.document, row.position)
            writer.writerow([*numbers, _plain(text), _plain(following), *[""] * 5])
    return path


def sampled(frame: pandas.DataFrame, per_layer: int, k: int, seed: int) -> pandas.DataFrame:
    """Returns the first ``k`` triggers of some memories of each layer, drawn by their numbers."""
    kept = []
    for layer, group in frame.groupby("layer"):
        numbers = sorted(set(group["neuron"]))
        order = sorted(numbers, key=lambda n: draw(2**62, seed, int(layer), int(n)))
        kept.append(group[group["neuron"].isin(order[:per_layer]) & (group["rank"] < k)])
    return frame if not kept else frame.loc[[index for part in kept for index in part.index]]


def _plain(text: str) -> str:
    """Returns text that a spreadsheet shows and does not run."""
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into an error that says so."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            four_parts(
                f"{path} cannot be written",
                str(error),
                "a file in a folder that exists, with room",
                "Choose another path.",
            )
        ) from error
