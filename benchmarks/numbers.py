"""How exact the numbers are: every method in every precision, over all families of the tests.

``python benchmarks/numbers.py [--write]`` prints one Markdown table: the largest error of each
method, relative to its largest number, against the same weights in float64. ``--write`` puts it
into docs/pages/numbers.md, between its markers.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import precision
import zoo


def measured() -> tuple[dict[str, dict[str, float]], set[str]]:
    """Returns the largest errors by method and dtype, and what was refused in which dtype."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    refused = set()
    for case in zoo.cases():
        for dtype in (torch.float64, *precision.DTYPES):
            name = str(dtype).removeprefix("torch.")
            # In float64 a model is compared with itself: only its reading says something.
            some = [] if dtype == torch.float64 else None
            for method, error in precision.errors(case, dtype, some).items():
                if math.isnan(error):
                    refused.add(f"{case.family} in {name}")
                else:
                    found[method][name] = max(error, found[method].get(name, 0.0))
        sys.stderr.write(f"{case}\n")
    return found, refused


def table(found: dict[str, dict[str, float]]) -> str:
    """Returns the Markdown table, numbers rounded up to one digit."""
    names = ("float64", "float32", "float16", "bfloat16")
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method, errors in found.items():
        cells = [_up(errors[name]) if name in errors else "-" for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _up(error: float) -> str:
    if error == 0:
        return "0"
    step = 10.0 ** math.floor(math.log10(error))
    return f"{math.ceil(error / step) * step:.0e}"


def main() -> None:
    """Prints the table, or puts it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, refused = measured()
    block = table(found)
    if refused:
        block += f"\n\nRefused, as activations overflow: {', '.join(sorted(refused))}."
    sys.stdout.write(block + "\n")
    if options.write:
        text = precision.PAGE.read_text()
        precision.PAGE.write_text(precision.written(text, block))


if __name__ == "__main__":
    main()
