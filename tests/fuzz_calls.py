"""Calls every public function with arguments of wrong type, shape and range; prints what escapes.

Run by test_fuzz.py in a process of its own: there the package is as its users have it, without
the type checks that the tests put on. ``python tests/fuzz_calls.py SECONDS`` searches for longer.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from asked import case_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public import FUNCTIONS

import tl_contextmix as cm
from tl_contextmix.errors import FileFormatError
from tl_contextmix.evaluation import MinimalPair

ALLOWED = (cm.InvalidInput, cm.UnsupportedModel, FileFormatError)
IDS = torch.tensor([[5, 9, 17, 30], [8, 7, 44, 12]])
LINES = '{"sentence_good": "the cat sat", "sentence_bad": "the dog sat"}\n'


LONGEST = 10  # seconds of the processor that one call on four tokens may take


def too_long(number: int, frame: Any) -> None:
    """Ends a call that does not come back."""
    raise TimeoutError(f"not back after {LONGEST} seconds")


class Hostile:
    """An object that answers nothing."""

    def __repr__(self) -> str:
        raise RuntimeError("no words for it")

    def __len__(self) -> int:
        raise RuntimeError("no length")

    __hash__ = None  # type: ignore[assignment]


def junk() -> list[Any]:
    """Values that are wrong in most places and right in some."""
    nan, inf = float("nan"), float("inf")
    return [
        *(None, True, False, -1, 0, 1, 2, 3, 10**30, -(10**30), 2.5, nan, inf, 1j),
        *("", " ", "x", "the cat", "\ud800", "\x00", "<b>", "../x" * 200, b"x", bytearray(b"x")),
        *([], [None], [[]], [1, "x"], [-5], [0, 0], [10**30], [5.7], ["the", ""], [[0, 1]]),
        *((), (1,), (0, 1, 2), {}, {"x": 1}, {1: 2}, set(), range(3), slice(1), iter("ab")),
        *(object(), object, Hostile(), lambda *a, **k: None, Path("/nowhere/x"), np.int64(1)),
        *(np.zeros(2), np.array("x"), torch.tensor(1), torch.tensor(nan), torch.zeros(0)),
        *(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.full((2, 4), 10**6)),
        *(torch.tensor([[5, 6]]), torch.zeros(1, 1, 1, 1), torch.zeros(1, 40, dtype=torch.long)),
        *(torch.full((2, 4), -1), torch.zeros(2, 4, dtype=torch.complex64), torch.float16, "cpu"),
    ]


def calls(folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments that each public function works with, by its name."""
    case = case_of("gpt2")
    model = zoo.build(case, dtype=torch.float32)
    both = next((case for case in zoo.cases() if case.encoder_decoder), case)
    lens = zoo.build(both, dtype=torch.float32)
    maps = cm.attention_norms(model, IDS, at=["mlp_in", "mlp_out"])
    one = maps["mlp_in"]
    found = cm.log_prob_contributions(model, IDS, by="ff_neuron", k=3)
    pairs = folder / "pairs.jsonl"
    pairs.write_text(LINES * 3)
    corpus = folder / "corpus.txt"
    corpus.write_text("the cat sat on the mat\na dog ran to the house\n" * 3)
    cm.mine_triggers(model, corpus, out=folder / "mined", k=2)
    few = [
        MinimalPair("the dog on a mat sat", "the dog on a mat is"),
        MinimalPair("a dog", "a mat"),
    ]
    on_ids = {"model": model, "input": IDS}
    special: dict[str, dict[str, Any]] = {
        "agreement": {"a": [one], "b": [one]},
        "amplified_pairs": {"before": one, "after": maps["mlp_out"]},
        "cancellation": {"maps": maps},
        "check": {"model": model},
        "compare": {"model": model, "input": few, "methods": ["attention"]},
        "component_readouts": {**on_ids, "components": found},
        "cite": {},
        "composition": {"model": model, "corpus": corpus},
        "context_reliance": {"model": model, "context": "the dog", "prompt": "the cat"},
        "contextualization_change": {"maps": maps},
        "cue_alignment": {"maps": [one], "cues": [[1], [2]]},
        "decoder_lens": {"model": lens, "input": IDS, "max_new_tokens": 3},
        "demo_pairs": {"count": 2},
        "estimate": {"model": model, "n_tokens": 5, "method": cm.attention},
        "hook_names": {"model": model, "method": "attention"},
        "faithfulness": {**on_ids, "map": cm.gradient_x_input(model, IDS)},
        "ff_values": {"model": model},
        "flow": {"model": model, "input": IDS[:1]},
        "flow_knockout": {
            "model": model,
            "input": IDS[:1],
            "k": 2,
            "controls": 1,
            "graph": cm.flow(model, IDS[:1], k=5),
        },
        "information_flow_routes": {"model": model, "input": IDS[:1]},
        "integrated_gradients": {**on_ids, "steps": 2},
        "knockout": {**on_ids, "heads": [(0, 1)], "controls": 1},
        "load_demo": {"name": "causal-lm"},
        "load_minimal_pairs": {"path": pairs},
        "load_model": {"name_or_path": folder},
        "load_triggers": {"folder": folder / "mined"},
        "merge_triggers": {"out": folder / "mined"},
        "mine_on_ray": {"load": lambda: model, "corpus": corpus, "out": folder / "ray"},
        "mine_triggers": {"model": model, "corpus": corpus, "out": folder / "again", "k": 2},
        "probe": {**on_ids, "classes": [0, 1], "pos": -1, "seeds": 1},
        "query_contributions": {**on_ids, "neurons": [(1, 3)]},
        "report": {"model": model, "text": IDS[:1], "sections": ["prediction"]},
        "scan": {"model": model, "rows": [([5, 6, 7], 3, 4, "a"), ([5, 6], 3, 4, "b")]},
    }
    plain = {name: on_ids for name in FUNCTIONS if name not in special}
    return special | plain | {"MinimalPair": {"good": "the cat", "bad": "the dog"}}


def named(name: str) -> Any:
    """What a name of the table stands for."""
    return MinimalPair if name == "MinimalPair" else FUNCTIONS[name]


class Fuzz:
    """Calls functions with a few arguments replaced, and keeps what escapes.

    Attributes:
        escaped: What was raised that is none of ours, by where it came from.
        made: How many calls were made.
    """

    def __init__(self) -> None:
        self.escaped: dict[str, str] = {}
        self.made = 0

    def run(self, name: str, arguments: dict[str, Any], examples: int, seconds: float) -> None:
        """Calls one function many times."""
        function = named(name)
        names = list(inspect.signature(function).parameters)
        end = time.process_time() + seconds

        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck.__members__.values()],
        )
        @given(st.data())
        def many(data: st.DataObject) -> None:
            values = junk()
            wrong = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
            changed = {key: values[data.draw(st.integers(0, len(values) - 1))] for key in wrong}
            if time.process_time() > end:
                return
            self.made += 1
            self._call(name, function, arguments, changed)

        many()

    def _call(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        changed: dict[str, Any],
    ) -> None:
        given = {**arguments, **changed}
        rest = given.pop("used", None)
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            function(*([] if rest is None else [rest]), **given)
        except ALLOWED:
            pass
        except Exception as error:
            own = [
                f for f in traceback.extract_tb(error.__traceback__) if "contextmix" in f.filename
            ]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "nowhere"
            seen = {key: _shown(value) for key, value in changed.items()}
            key = f"{name}: {type(error).__name__} at {place}"
            self.escaped.setdefault(key, f"{error!s:.200} with {seen}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def main(seconds: float) -> int:
    """Calls everything, prints what is not one of ours, and returns how much that was."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, too_long)
    # A cluster takes ten seconds to start and is not stopped by a signal: what is given to it is
    # looked at before.
    sys.modules["ray"] = None  # type: ignore[assignment]
    fuzz = Fuzz()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        table = calls(Path(place))
        for name, arguments in table.items():
            fuzz.run(name, arguments, int(seconds * 10), seconds / len(table))
    for key, seen in fuzz.escaped.items():
        sys.stdout.write(f"ESCAPED {key}\n    {seen}\n")
    escapes = len(fuzz.escaped)
    sys.stdout.write(f"{fuzz.made} calls of {len(table)} functions, {escapes} escapes\n")
    return len(fuzz.escaped)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except RuntimeError:
        return type(value).__name__


if __name__ == "__main__":
    sys.exit(bool(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)))
