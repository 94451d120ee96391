"""How far numbers of a model in a lower precision are from those of the same weights in float64.

The exact model has the rounded weights: what is measured is arithmetic, the host's and ours, not
what rounding does to a model. ``benchmarks/numbers.py`` writes the table of docs/pages/numbers.md
from it, and ``test_numbers.py`` holds a few families to that table.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
import zoo
from asked import relative
from test_conformance import ASKED, Method, ask

import tl_contextmix as cm

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pages" / "numbers.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
READING = "the model read (`check`)"
"""The row that says how well the package reproduces the model's own activations."""
_MARKED = re.compile(r"(<!-- numbers -->\n).*?(<!-- end of numbers -->)", re.DOTALL)


def models(case: zoo.Case, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of a dtype, and one of the same weights that computes in float64."""
    exact = zoo.build(case)
    with torch.no_grad():
        for weight in exact.parameters():
            weight.copy_(weight.to(dtype))
    return zoo.build(case, dtype=dtype), exact


def methods(case: zoo.Case) -> list[Method]:
    """What a case can be asked."""
    return [method for method, other in (param.values for param in ASKED) if other == case]


def numbers(method: Method, model: Any, case: zoo.Case, given: zoo.Inputs) -> torch.Tensor:
    """The numbers of a method, about the same prediction whatever the model finds likely."""
    names = inspect.signature(method.ask).parameters
    fixed: dict[str, Any] = {"target_ids": 7} if "target_ids" in names else {}
    fixed |= {"target": 7} if method.name in ("gradient_x_input", "integrated_gradients") else {}
    found = method.values(ask(method, model, case, given, **fixed))
    return torch.nan_to_num(found, nan=0.0)  # what is not there: components after the position


def errors(case: zoo.Case, dtype: torch.dtype, some: list[str] | None = None) -> dict[str, float]:
    """Each method's largest error, relative to its largest number; NaN where it refuses."""
    low, exact = models(case, dtype)
    given = zoo.inputs(case)
    found = {READING: max(row.error for row in cm.check(low).rows if row.ok)}
    for method in methods(case):
        if some is not None and method.name not in some:
            continue
        try:
            near = numbers(method, low, case, given)
        except cm.InvalidInput:
            found[method.name] = float("nan")
            continue
        found[method.name] = relative(near.double(), numbers(method, exact, case, given))
    return found


def stated(text: str) -> dict[str, dict[str, float]]:
    """The table of the page: by method and dtype."""
    block = _MARKED.search(text)
    assert block is not None
    rows = [line for line in block[0].splitlines() if line.startswith("| ")]
    _, *names = _cells(rows[0])
    return {
        cells[0]: {
            name: float(cell) for name, cell in zip(names, cells[1:], strict=True) if cell != "-"
        }
        for cells in map(_cells, rows[1:])
    }


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def written(text: str, table: str) -> str:
    """The page with another table."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)
