"""How exact the numbers are: the error of every method in every precision.

``python benchmarks/precision.py [--write]`` prints the tables of docs/pages/numbers.md; ``--write``
stores what was measured in results.json beside this file and puts the tables into the page.
``tests/rounding.py`` says what is measured. Takes minutes; needs TransformerLens 4. ``--only
products`` repeats the table of ``precision="bfloat16"`` alone, in seconds.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import methods
import tables
import torch
from memories import gpt2
from meters import command_line, machine, show

# The models of the tests are not part of the package.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import rounding
import zoo

Gaps = dict[str, dict[str, float]]
Errors = dict[str, dict[str, dict[str, float]]]
INSIDE = "float64, float32 inside"
"""Models in float64 of which Hugging Face computes norms or attention in float32."""


def measured(families: tuple[str, ...], draws: int) -> dict[str, Any]:
    """Returns the largest errors over families and draws of weights, by dtype and method."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in rounding.DTYPES}
    errors: Errors = {name: {} for name in names.values()}
    gaps: Gaps = {name: {} for name in ("float64", INSIDE, *names.values())}
    cases = {case.family: case for case in zoo.cases()}
    for family, seed in product(families, range(draws)):
        case = cases[family]
        inside = (family, case.host) in zoo.FLOAT32_INSIDE
        _widen(gaps[INSIDE if inside else "float64"], rounding.gaps(case, torch.float64, seed))
        for dtype, name in names.items():
            _widen(gaps[name], rounding.gaps(case, dtype, seed))
            for kind, found in rounding.errors(case, dtype, seed).items():
                for method, error in found.items():
                    _widen(errors[name].setdefault(method, {}), {kind: error})
        sys.stderr.write(f"{family}, draw {seed}\n")
    return {"errors": errors, "gaps": gaps}


def _widen(largest: dict[str, float], found: Mapping[str, float]) -> None:
    for name, error in found.items():
        if not math.isfinite(error):
            raise ValueError(f"{name} gives no finite numbers")
        largest[name] = max(error, largest.get(name, 0.0))


def products(draws: int) -> dict[str, dict[str, list[float]]]:
    """Returns errors of ``precision="bfloat16"`` by model and point: the largest, the median.

    The largest relative to the largest norm, over families and draws; the median relative to each
    norm.
    """
    cases = {case.family: case for case in zoo.cases()}
    tiny = [
        rounding.products(cases[family], s) for family in rounding.FAMILIES for s in range(draws)
    ]
    wide, ids = gpt2(methods.LAYERS, 768, methods.VOCABULARY), methods.words(64, methods.VOCABULARY)
    found = {"tests' families": tiny, "GPT-2's widths": [rounding.of_products(wide, ids)]}
    return {
        name: {
            at: [max(one[at][0] for one in rows), max(one[at][1] for one in rows)] for at in rows[0]
        }
        for name, rows in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and stores if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--write", action="store_true", help="store, and update the page")
    parser.add_argument("--draws", type=int, default=3, help="of weights, for each family")
    parser.add_argument("--only", choices=("products",), help="measure this part")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"products": products(given.draws)}
    if given.only is None:
        found["numbers"] = _numbers(given.draws)
        show(f"\n{tables.numbers(found)}\n")
    show(f"\n{tables.products(found)}\n")
    if given.write:
        tables.keep(found)
        tables.write()


def _numbers(draws: int) -> dict[str, Any]:
    """Returns what the page's first tables are made of."""
    return measured(rounding.FAMILIES, draws) | {
        "kinked": measured((rounding.KINKED,), draws)["errors"],
        "machine": machine().rpartition("; ")[0],
        "families": ", ".join(rounding.FAMILIES),
        "draws": draws,
        "identities": {name: text for name, (text, _) in rounding.IDENTITIES.items()},
    }


if __name__ == "__main__":
    main()
