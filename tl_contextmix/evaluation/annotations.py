"""Annotators' sheets, read back: what share of triggers has a shallow or a semantic pattern."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.core.validation import FilePath, checked
from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.results import CurvePoint, LayerCurves, Provenance

KINDS = ("shallow", "semantic")
CLASSES = ("shallow", "semantic", "shallow + semantic", "none")
KAPPA = "kappa"
_PATTERNS = ("pattern_1", "pattern_2", "pattern_3", "pattern_4")
Row = tuple[int, int, int]


@checked
def read_annotations(*paths: FilePath) -> LayerCurves:
    r"""Returns the share of triggers that annotators found patterns in, by layer (2021, figure 2).

    In a sheet that `Triggers.to_sheet` wrote, a trigger that has a pattern names it in one of its
    four columns, with its kind before a colon: ``shallow: ends with "press"`` or ``semantic: names
    of cities``. Shares of ``shallow``, ``semantic``, both and ``none`` are of the triggers of a
    memory, averaged over the memories of a layer and the annotators, with bootstrap intervals over
    memories. Of two annotators or more, ``kappa`` is the mean over pairs of Cohen's

    .. math:: \kappa = \frac{p_o - p_e}{1 - p_e}

    with :math:`p_o` how often both say the same of a trigger and :math:`p_e` how often they would
    by chance; NaN where both say the same of every trigger.

    Args:
        paths: The sheets, one of each annotator, of the same triggers.

    Returns:
        `LayerCurves`, metrics ``"share of triggers"`` (by category) and ``"kappa"``.

    Raises:
        InvalidInput: If there is no sheet, or they are of other triggers.
        FileFormatError: If a file is no sheet, or a pattern has no kind.
    """
    sheets = [_read(Path(path)) for path in paths]
    if not sheets or any(sheet.keys() != sheets[0].keys() for sheet in sheets):
        raise InvalidInput(
            "these sheets cannot be read together",
            f"{[len(sheet) for sheet in sheets]} triggers",
            "at least one sheet, all of the same triggers",
            "Give each annotator a copy of one sheet.",
        )
    points = []
    for layer in sorted({layer for layer, _, _ in sheets[0]}):
        rows = [row for row in sheets[0] if row[0] == layer]
        points += [_share(sheets, rows, layer, kind) for kind in CLASSES]
        pairs = [(a, b) for i, a in enumerate(sheets) for b in sheets[:i]]
        found = [_kappa([a[row] for row in rows], [b[row] for row in rows]) for a, b in pairs]
        if found:
            mean, nothing = sum(found) / len(found), float("nan")
            points.append(CurvePoint(KAPPA, "all", layer, mean, nothing, nothing, len(rows)))
    return LayerCurves(
        points=tuple(points),
        title="Annotated triggers",
        caption=f"Means over memories and {len(sheets)} annotators; intervals over memories.",
        provenance=Provenance("read_annotations", {"sheets": len(sheets)}, "", "", "", "", (), ""),
    )


def _read(path: Path) -> dict[Row, str]:
    """Returns the class of each trigger of a sheet, by layer, neuron and rank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [*csv.DictReader(file)]
        return {
            (int(row["layer"]), int(row["neuron"]), int(row["rank"])): _class(row, path)
            for row in rows
        }
    except (OSError, KeyError, ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{path} is no annotated sheet",
            repr(error)[:200],
            "a CSV file as Triggers.to_sheet writes it",
            "Export the sheet as CSV, with all its columns.",
        ) from error


def _class(row: dict[str, Any], path: Path) -> str:
    kinds = set()
    for column in _PATTERNS:
        text = (row[column] or "").strip()
        kind = text.partition(":")[0].strip().lower()
        if text and kind not in KINDS:
            raise FileFormatError(
                f"a pattern in {path} has no kind",
                f"{text!r} of layer {row['layer']}, neuron {row['neuron']}",
                "'shallow: ...' or 'semantic: ...'",
                "Write its kind before a colon.",
            )
        kinds.add(kind) if text else None
    return " + ".join(kind for kind in KINDS if kind in kinds) or "none"


def _share(sheets: list[dict[Row, str]], rows: list[Row], layer: int, kind: str) -> CurvePoint:
    found: dict[int, list[bool]] = {}
    for row in sorted(rows):
        found.setdefault(row[1], []).extend(sheet[row] == kind for sheet in sheets)
    shares = [sum(each) / len(each) for each in found.values()]
    values = torch.tensor(shares, dtype=torch.float64)
    mean, (low, high) = float(values.mean()), bootstrap_interval(values)
    return CurvePoint("share of triggers", kind, layer, mean, low, high, len(values))


def _kappa(a: list[str], b: list[str]) -> float:
    same = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    ours, theirs = Counter(a), Counter(b)
    chance = sum(ours[kind] * theirs[kind] for kind in CLASSES) / len(a) ** 2
    return (same - chance) / (1 - chance) if chance < 1 else float("nan")
