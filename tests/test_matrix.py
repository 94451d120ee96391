"""A matrix that lost something fails; see `matrix`."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrix
import pytest
import test_conformance
import test_goldens
import test_render_results
import unchecked
import zoo
from matrix import CONTRACT, GOLDENS, SHOWN, Matrix
from zoo import major

PLACES = [(CONTRACT, "a", "x-H"), (CONTRACT, "a", "y-H"), (GOLDENS, "b", "x-H")]


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """A run in which everything passed."""
    monkeypatch.setattr(matrix, "COVERAGE", tmp_path / "coverage.json")
    found = Matrix()
    found.collected = {f"test {number}": [place] for number, place in enumerate(PLACES)}
    found.passed = Counter(PLACES)
    matrix.COVERAGE.write_text(json.dumps({str(major()): found.table()}))
    return found


def test_what_passed_is_printed_and_enough(full: Matrix) -> None:
    assert full.lost() == []
    assert any("1 / 1 (+0)" in line or "2 / 2 (+0)" in line for line in full.lines())


@pytest.mark.parametrize("place", PLACES)
def test_what_did_not_pass_fails(full: Matrix, place: matrix.Place) -> None:
    del full.passed[place]
    assert full.lost()
    session: Any = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    full.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    full.left_out = True
    assert full.lost() == []


def test_a_case_that_is_no_longer_collected_fails(full: Matrix) -> None:
    full.collected = {"test 0": [PLACES[0]], "test 2": [PLACES[2]]}
    full.passed = Counter([PLACES[0], PLACES[2]])
    assert any("y-H" in line for line in full.lost())


@pytest.mark.once
def test_fast_tests_ask_every_method_on_every_class_and_show_every_result() -> None:
    options = ["-m", "fast", "--collect-only", "-q", "-p", "no:cacheprovider"]
    said = unchecked.run("-m", "pytest", *options, "--jaxtyping-packages=")
    found = re.findall(r"^tests/(\w+)\.py::\w+\[(.+)\]$", said, re.MULTILINE)
    ids = {name: {own for module, own in found if module == name} for name in matrix.FAST}
    cases = [case for case in zoo.cases() if case.id in ids[GOLDENS]]
    assert {case.host for case in cases} == {case.host for case in zoo.cases()}
    asked = {name for case in cases for name in test_goldens.asked(case)}
    assert asked == {name for case in test_goldens.CASES for name in test_goldens.asked(case)}
    assert {own.partition("-")[0] for own in ids[CONTRACT]} >= {
        method.name for method in test_conformance.METHODS
    }
    assert ids[SHOWN] >= {kind.__name__ for kind in test_render_results.EXAMPLES}
