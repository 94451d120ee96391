"""What the demo model's answers hang on: attention to the deciding words, and to tempting ones.

``python benchmarks/attention_knockout.py [--pairs N]`` cuts, in all layers at once, the edges from
the predicting position to the words that decide between right and wrong (a verb's subject, what a
fact is about, an indirect object's first mention) and to those that suggest the wrong word.
Printed: the change of log p(right) - log p(wrong) in nats, each with a 95 % bootstrap interval over
pairs. Takes half a minute.
"""

from __future__ import annotations

import warnings
from typing import Any

from meters import command_line, say_means

import tl_contextmix as cm
from tl_contextmix.evaluation import demo_pairs

KINDS = ("agreement", "fact", "name")
LURELESS = ("fact",)


def changes(model: Any, kind: str, count: int) -> dict[str, list[float]]:
    """Returns the change of each pair's log-odds, by what no position reads any more."""
    found: dict[str, list[float]] = {}
    for pair in demo_pairs(kind, count, lures=kind not in LURELESS):
        prefix = pair.prefix.split()
        named = {
            name: [1 + len(pair.good[:start].split()) for start, _ in stretches]
            for name, stretches in (("deciding", pair.cues), ("tempting", pair.lures))
        }
        cut = cm.attention_knockout(
            model,
            " ".join(prefix),
            target=f" {pair.answer}",
            foil=f" {pair.wrong}",
            sources={name: places for name, places in named.items() if places},
            window=None,
        )
        for name, change in zip(cut.source.strings[0], cut.changes.flatten().tolist(), strict=True):
            found.setdefault(name, []).append(change)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=50, help="how many pairs of each kind")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    model = cm.load_demo("causal-lm")
    for kind in KINDS:
        found = changes(model, kind, given.pairs)
        say_means(kind, found, f"{given.pairs} pairs", digits=1)


if __name__ == "__main__":
    main()
