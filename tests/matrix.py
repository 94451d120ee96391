"""What the contract and the goldens cover: counted while tests run, printed, and held to a file.

``python tests/matrix.py`` writes the row of the installed TransformerLens in ``coverage.json``. It
only counts tests, so it takes seconds. A run that leaves tests out is not held to the file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COVERAGE = Path(__file__).parent / "coverage.json"
CONTRACT, GOLDENS, SHOWN = "test_conformance", "test_goldens", "test_render_results"
ONCE = "test_family_contract"  # the contract, one row for each further family
# Every method on every class of TransformerLens, and every result: a minute for contributors.
FAST: dict[str, set[str] | None] = {
    CONTRACT: {"gpt2"},
    GOLDENS: {"gpt2", "bert", "t5"},
    SHOWN: None,
}
"""Families by module; None: all tests of the module."""

Place = tuple[str, str, str]
"""Table, method and case."""


def _asked(item: pytest.Item) -> tuple[str, dict[str, Any]]:
    """Name of a test's module, and its parameters."""
    return item.path.stem, getattr(getattr(item, "callspec", None), "params", {})


def is_fast(item: pytest.Item) -> bool:
    """Whether a test is `fast`."""
    module, params = _asked(item)
    families = FAST.get(module, set())
    return families is None or getattr(params.get("case"), "family", None) in families


def places(item: pytest.Item) -> list[Place]:
    """The places of the matrix that a test fills."""
    module, params = _asked(item)
    case, method = params.get("case"), params.get("method")
    if case is None or module not in (CONTRACT, ONCE, GOLDENS):
        return []
    if module == ONCE:  # without families on older versions, where pytest has a placeholder
        methods = params["methods"]
        found = methods if isinstance(methods, tuple) else ()
        return [(ONCE, one.name, case.id) for one in found]
    if module == CONTRACT:
        return [(CONTRACT, method.name, case.id)] if method is not None else []
    asked = sys.modules[item.module.__name__].asked(case)  # type: ignore[attr-defined]
    return [(GOLDENS, name, case.id) for name in asked]


def as_table(counted: Counter[Place]) -> dict[str, dict[str, Any]]:
    """Counts as the file holds them: tests per method, and the cases."""
    found: dict[str, dict[str, Any]] = {CONTRACT: {}, ONCE: {}, GOLDENS: {}}
    for (table, method, _), count in sorted(counted.items()):
        found[table][method] = found[table].get(method, 0) + count
    for table in found:
        found[table]["cases"] = sorted({case for own, _, case in counted if own == table})
    return found


def missing(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """What a table has lost."""
    gone = set(expected["cases"]) - set(found["cases"])
    if gone:
        yield f"no longer run: {', '.join(sorted(gone))}"
    for method, count in expected.items():
        if method != "cases" and found.get(method, 0) < count:
            yield f"{method}: {found.get(method, 0)} of {count} tests passed"


class Matrix:
    """The plugin: collects, counts what passed, prints, and fails when something is missing."""

    def __init__(self) -> None:
        self.collected: dict[str, list[Place]] = {}
        self.passed: Counter[Place] = Counter()
        self.left_out = False

    def table(self) -> dict[str, dict[str, Any]]:
        """What was collected, run or not."""
        return as_table(Counter(place for found in self.collected.values() for place in found))

    # Before others take items away.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Notes where every test belongs."""
        self.left_out = any("::" in str(argument) for argument in config.args)
        self.collected = {item.nodeid: found for item in items if (found := places(item))}

    def pytest_deselected(self, items: list[Any]) -> None:
        """A run of some tests says nothing about the others."""
        self.left_out = self.left_out or bool(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts what passed."""
        if report.when == "call" and report.passed:
            self.passed.update(self.collected.get(report.nodeid, ()))

    def lost(self) -> list[str]:
        """What the file expects of the tables that were run, and did not pass."""
        from zoo import major

        if self.left_out:
            return []
        known = json.loads(COVERAGE.read_text())[str(major())]
        found = as_table(self.passed)
        tables = {place[0] for places in self.collected.values() for place in places}
        return [f"{t}: {text}" for t in sorted(tables) for text in missing(known[t], found[t])]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fails a run that passed but covered less."""
        if session.exitstatus == pytest.ExitCode.OK and self.passed and self.lost():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints methods, hosts and counts."""
        if not self.passed:
            return
        terminalreporter.section("covered")
        for line in self.lines():
            terminalreporter.write_line(line)
        for line in self.lost():
            terminalreporter.write_line(f"COVERAGE SHRANK: {line}", red=True)

    def lines(self) -> Iterator[str]:
        """The table: contract tests and goldens per method and host."""
        from zoo import major

        hosts = sorted({case.partition("-")[2] for _, _, case in self.passed})
        methods = sorted({method for _, method, _ in self.passed})
        yield f"TransformerLens {major()}: contract tests / families (+ goldens) by host"
        yield "  ".join([f"{'method':38}", *(f"{host:>20}" for host in hosts)])
        for method in methods:
            cells = [self._cell(method, host) for host in hosts]
            yield "  ".join([f"{method:38}", *(f"{cell:>20}" for cell in cells)])
        cases = {case for _, _, case in self.passed}
        yield f"{len(methods)} methods, {len(cases)} cases, {self.passed.total()} answers"

    def _cell(self, method: str, host: str) -> str:
        here = [p for p in self.passed if p[1] == method and p[2].partition("-")[2] == host]
        contract = [place for place in here if place[0] != GOLDENS]
        tests = sum(self.passed[place] for place in contract)
        goldens = len(here) - len(contract)
        return f"{tests or '-'} / {len(contract) or '-'} (+{goldens})"


def main() -> None:
    """Writes the row of the installed version."""
    from zoo import major

    plugin = Matrix()
    files = [str(COVERAGE.with_name(f"{name}.py")) for name in (CONTRACT, ONCE, GOLDENS)]
    options = ["--collect-only", "-qqq", "-p", "no:cacheprovider"]
    if pytest.main([*options, *files], plugins=[plugin]) != pytest.ExitCode.OK:
        raise SystemExit("the tests could not be collected")
    known = json.loads(COVERAGE.read_text()) if COVERAGE.exists() else {}
    known[str(major())] = plugin.table()
    COVERAGE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
