"""How well `context_reliance` finds the passage that contradicts what the demo model knows.

``python benchmarks/context_reliance.py [--facts N]`` asks about facts of countries after three
passages in random order: one says that the capital is another city, two are about other countries.
The answer is that city and a full stop. Printed, each with a 95 % bootstrap interval over facts:

* flagged: how often the city is flagged and the full stop is not.
* contradiction: how often the passage with the highest score is the one that contradicts.
* removal: how often it is the passage without which the city is least probable.

Chance is 1/3 for the last two. Takes a minute.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

from meters import command_line, say_means

import tl_contextmix as cm
from tl_contextmix.demo_models.lexicon import FACTS
from tl_contextmix.evaluation.context_reliance import By

WAYS: tuple[By, ...] = ("gradient_x_input", "attention_knockout", "value_zeroing")


def cases(count: int, seed: int = 0) -> Iterator[tuple[list[str], int, str, str]]:
    """Yields passages, the place of the one that contradicts, the prompt and the answer."""
    draw = random.Random(seed)
    for country, _, _ in draw.sample(FACTS, count):
        others = draw.sample([fact for fact in FACTS if fact[0] != country], 4)
        wrong = others[0][1]
        passages = [
            f"the capital of {country} is {wrong} .",
            f"the capital of {others[1][0]} is {others[2][1]} .",
            f"people in {others[3][0]} speak {others[3][2]} .",
        ]
        order = draw.sample(range(3), 3)
        shuffled = [passages[place] for place in order]
        yield shuffled, order.index(0), f"the capital of {country} is", f" {wrong} ."


def measured(model: Any, count: int) -> dict[str, dict[str, list[float]]]:
    """Returns what is right about each fact, by way and figure."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for passages, place, prompt, answer in cases(count):
        removed = [
            float(
                cm.log_prob_contributions(
                    model,
                    " ".join([*passages[:gone], *passages[gone + 1 :], prompt]),
                    target=answer.removesuffix(" ."),
                ).log_prob
            )
            for gone in range(len(passages))
        ]
        needed = min(range(len(passages)), key=removed.__getitem__)
        for way in WAYS:
            one = cm.context_reliance(model, passages, prompt, target=answer, by=way)
            best = int(one.scores[0, 0].argmax())
            for name, right in (
                ("flagged", one.flagged[0].tolist() == [True, False]),
                ("contradiction", best == place),
                ("removal", best == needed),
            ):
                found[way].setdefault(name, []).append(float(right))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = command_line(__doc__)
    parser.add_argument("--facts", type=int, default=len(FACTS), help="how many facts")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found = measured(cm.load_demo("causal-lm"), given.facts)
    for way, figures in found.items():
        say_means(way, figures, f"{given.facts} facts")


if __name__ == "__main__":
    main()
