"""How many of the package's modules a call of a method goes through, once its model is known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest

import tl_contextmix as cm

PACKAGE = Path(cm.__file__).parent
MOST = 20


def modules_of_a_call() -> dict[str, set[str]]:
    """Functions by module, in the order in which a second call of `attention_norms` enters them."""
    model = cm.load_demo("causal-lm")
    cm.attention_norms(model, "the cat sat", at="mlp_out")
    found: dict[str, set[str]] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        cm.attention_norms(model, "the cat sat", at="mlp_out")
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.once
def test_a_warm_call_stays_within_few_modules() -> None:
    found = modules_of_a_call()
    assert "attention_norms" in found["methods/norms.py"]
    assert "run" in found["adapters/running.py"]
    assert len(found) <= MOST, list(found)


if __name__ == "__main__":
    for module, functions in modules_of_a_call().items():
        sys.stdout.write(f"{module}: {', '.join(sorted(functions))}\n")
