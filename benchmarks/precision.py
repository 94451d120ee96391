"""How exact the numbers are: the error of every method in every precision.

``python benchmarks/precision.py [--write]`` prints the tables of docs/pages/numbers.md; ``--write``
stores what was measured in results.json beside this file and puts the tables into the page.
``tests/rounding.py`` says what is measured. Takes minutes; needs TransformerLens 4.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import tables
import torch
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


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and stores if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--write", action="store_true", help="store, and update the page")
    parser.add_argument("--draws", type=int, default=3, help="of weights, for each family")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    numbers = measured(rounding.FAMILIES, given.draws) | {
        "kinked": measured((rounding.KINKED,), given.draws)["errors"],
        "machine": machine().rpartition("; ")[0],
        "families": ", ".join(rounding.FAMILIES),
        "draws": given.draws,
        "identities": {name: text for name, (text, _) in rounding.IDENTITIES.items()},
    }
    show(f"\n{tables.numbers({'numbers': numbers})}\n")
    if given.write:
        tables.keep({"numbers": numbers})
        tables.write()


if __name__ == "__main__":
    main()
