"""Which map to believe: every method on the embedded language models' own grammar.

``python benchmarks/compare.py [--sentences N] [--write]`` prints one Markdown table per model:
each method at its best layer, the best one's lead over the others, and every rollout with and
without the identity. ``--write`` puts them into docs/pages/methods/comparison.md, between its
markers. Seconds are left out of them: they depend on the machine.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from meters import command_line

import tl_contextmix as cm
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.results import Comparison

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "methods" / "comparison.md"
MODELS = ("causal-lm", "masked-lm")
_SHOWN = {
    "dot": "on the cue",
    "average precision": "average precision",
    "comprehensiveness": "comprehensiveness (nats)",
    "sufficiency": "sufficiency (nats)",
}
_COMPARED = {**_SHOWN, "blank-out": "blank-out"}
_ROLLED = ("dot", "blank-out")
_MARKED = re.compile(r"(<!-- comparison -->\n).*?(<!-- end of comparison -->)", re.DOTALL)


def table(found: Comparison) -> str:
    """Returns the Markdown table of a comparison, the best by the first metric on top."""
    best = {metric: found.best(metric).set_index("method") for metric in _SHOWN}
    lines = [
        "| method | " + " | ".join(_SHOWN.values()) + " | FLOPs / forward |",
        "|---" * (len(_SHOWN) + 2) + "|",
    ]
    for method in found.best()["method"]:
        cells = []
        for metric in _SHOWN:
            row = best[metric].loc[method]
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            cells.append(f"**{row['value']:.2f}** ({interval}; {row['layer']})")
        forward = best["dot"].loc[method]["forward"]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {forward:.1f} |")
    chance = [f"{best[metric]['chance'].iloc[0]:.2f}" for metric in _SHOWN]
    lines.append("| *chance* | " + " | ".join(f"*{level}*" for level in chance) + " | |")
    return "\n".join(lines)


def lead(found: Comparison) -> str:
    """Returns the Markdown table of how far the best method by the first metric is ahead."""
    first = found.best()["method"].iloc[0]
    columns = {metric: found.difference(first, metric=metric, layer="best") for metric in _COMPARED}
    lines = [
        "| less | " + " | ".join(_COMPARED.values()) + " |",
        "|---" * (len(_COMPARED) + 1) + "|",
    ]
    for rows in zip(*(one.rows for one in columns.values()), strict=True):
        cells = [f"{r.value:+.2f} ({r.low:.2f} to {r.high:.2f}; p {r.p:.4f})" for r in rows]
        lines.append(f"| {rows[0].other} | " + " | ".join(cells) + " |")
    return f"`{first}` less every other method, sentence by sentence:\n\n" + "\n".join(lines)


def rollouts(found: Comparison) -> str:
    """Returns the Markdown table of rollouts, with and without the identity."""
    cells: dict[str, dict[tuple[bool, str], str]] = {}
    whole = [row for row in found.rows if row.layer.startswith("input to ")]
    changed = {row.method: ", with " in row.layer for row in whole if "identity" in row.layer}
    for row in whole:
        if row.method in changed and row.metric in _ROLLED:
            added = ("identity" in row.layer) == changed[row.method]
            text = f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})"
            cells.setdefault(row.method, {})[added, row.metric] = text
    titles = [f"{name}, {how} identity" for name in _ROLLED for how in ("without", "with")]
    lines = ["| rollout | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for method, each in cells.items():
        row = [each[kind, metric] for metric in _ROLLED for kind in (False, True)]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "Rollouts through all layers:\n\n" + "\n".join(lines)


def main() -> None:
    """Prints the tables, or puts them into the page."""
    parser = command_line(__doc__)
    parser.add_argument("--sentences", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="update the page")
    options = parser.parse_args()
    parts = []
    for name in MODELS:
        found = cm.compare(cm.load_demo(name), demo_pairs(count=options.sentences))
        right = f"the model prefers the right verb in {found.correct} of {found.sentences}"
        parts.append(
            f"`{name}` ({right}):\n\n{table(found)}\n\n{lead(found)}\n\n{rollouts(found)}\n"
        )
        sys.stdout.write(parts[-1] + "\n")
        sys.stdout.flush()
    if options.write:
        text = PAGE.read_text()
        block = "\n".join(parts)
        PAGE.write_text(_MARKED.sub(lambda m: f"{m[1]}\n{block}\n{m[2]}", text))


if __name__ == "__main__":
    main()
