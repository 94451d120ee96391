"""Mutation testing of one module: cosmic-ray's mutants, tested in one process.

    pip install cosmic-ray
    python scripts/mutation.py tl_contextmix/core/token_sums.py tests/test_tensors.py
    python scripts/mutation.py tl_contextmix/engine/parts.py tests/test_decompose.py -k "..."

The tests are collected once. Then every mutant is compiled, with the type checks of the tests, and
put in the place of the original wherever that was imported, and the tests are called until one
fails. Seconds for what takes cosmic-ray hours, which starts pytest for each mutant. What survives
is printed with its change; CONTRIBUTING.md lists the survivors, and why.
"""

from __future__ import annotations

import importlib
import re
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import unified_diff
from inspect import isclass
from pathlib import Path
from typing import Any

import pytest
import torch

# Unions in annotations; operators no number here has; identity of integers, which is CPython's.
_LEFT_OUT = re.compile(
    r"core/ReplaceBinaryOperator_(BitOr_.*|.*_(BitAnd|BitOr|BitXor|LShift|RShift|Mod|Pow|FloorDiv))"
    r"|core/ReplaceComparisonOperator_.*_(Is|IsNot)"
)
# Of processor time.
_SECONDS = 60


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Every mutant of a source: the operator's name and the changed source, none twice."""
    # Not installed with the tests.
    mutate_code = importlib.import_module("cosmic_ray.mutating").mutate_code
    plugins = importlib.import_module("cosmic_ray.plugins")
    seen = {source}
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if _LEFT_OUT.fullmatch(name) or kind.arguments():
            continue
        occurrence, code = 0, mutate_code(source, kind(), 0)
        while code is not None:
            if code not in seen:
                yield name, code
            seen.add(code)
            occurrence += 1
            code = mutate_code(source, kind(), occurrence)


class TooLong(BaseException):
    """A mutant that does not end; no test takes it for an error."""


class Mutation:
    """The plugin that runs the tests on every mutant instead of once.

    Args:
        path: The module's file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        self.outcomes: Counter[str] = Counter()
        self.last = ""
        self.tried = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Tests the original, then every mutant."""
        tests = [item for item in session.items if isinstance(item, pytest.Function)]
        source = Path(self.path).read_text()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if self._outcome(source, tests) is not None:
                raise pytest.UsageError(f"the original fails already: {self.last}")
            for name, code in mutants(source):
                killed = self._outcome(code, tests)
                self.outcomes["survived" if killed is None else killed] += 1
                if killed is None:
                    _show(name, source, code)
        sys.stdout.write(f"\n{self.path}: {sum(self.outcomes.values())} mutants, ")
        sys.stdout.write(", ".join(f"{n} {what}" for what, n in self.outcomes.items()) + "\n")
        return True

    def _outcome(self, code: str, tests: list[pytest.Function]) -> str | None:
        """How a mutant was killed, or None."""
        # Names that annotations look up are remembered by module: each mutant has its own.
        self.tried += 1
        mutant = types.ModuleType(f"{self.module.__name__}_{self.tried}")
        mutant.__file__ = self.module.__file__
        loader: Any = self.module.__loader__
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            # Dataclasses look their module up.
            sys.modules[mutant.__name__] = mutant
            exec(loader.source_to_code(code.encode(), self.module.__file__), vars(mutant))
            with self._instead(mutant):
                for place, test in enumerate(tests):
                    torch.manual_seed(0)
                    spec = getattr(test, "callspec", None)
                    try:
                        test.obj(**(spec.params if spec else {}))
                    except pytest.skip.Exception:
                        continue
                    except BaseException:
                        # What killed one mutant often kills the next.
                        tests.insert(0, tests.pop(place))
                        raise
        except TooLong:
            return "killed by time"
        except (Exception, pytest.fail.Exception) as error:
            self.last = f"{tests[0].name}: {error!r}"
            return "killed"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.modules.pop(mutant.__name__, None)
        return None

    @contextmanager
    def _instead(self, mutant: types.ModuleType) -> Iterator[None]:
        """Puts a mutant's definitions wherever the original's were imported.

        Where those are classes, in the tests alone: the package's own type checks know the
        original ones.
        """
        own = {
            id(value): name
            for name, value in vars(self.module).items()
            if getattr(value, "__module__", None) == self.module.__name__
        }
        everywhere = not any(isclass(getattr(self.module, name)) for name in own.values())
        # The package guards its public functions when they are first asked for, and keeps them.
        package = vars(sys.modules["tl_contextmix"])
        changed: list[tuple[dict[str, Any], str, Any]] = []
        for name in set(own.values()) & set(package):
            changed.append((package, name, package.pop(name)))
        for name, module in list(sys.modules.items()):
            if name.startswith("test_") or (everywhere and name.startswith("tl_contextmix")):
                for key, value in list(vars(module).items()):
                    if own.get(id(value)) and hasattr(mutant, own[id(value)]):
                        changed.append((vars(module), key, value))
                        vars(module)[key] = getattr(mutant, own[id(value)])
        try:
            yield
        finally:
            for name in own.values():
                package.pop(name, None)
            for table, key, value in changed:
                table[key] = value


def _show(name: str, source: str, code: str) -> None:
    lines = list(unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[2:]
    place, changes = lines[0].split()[1].lstrip("-"), [line[:110] for line in lines[1:]]
    sys.stdout.write(f"survived: line {place}, {name}\n" + "".join(f"    {x}\n" for x in changes))
    sys.stdout.flush()


def _too_long(*_: object) -> None:
    raise TooLong


def main(path: str, *options: str) -> int:
    """Returns pytest's exit status."""
    signal.signal(signal.SIGPROF, _too_long)
    started = time.monotonic()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *options], plugins=[_Late(path)])
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return int(status)


class _Late:
    """Imports the module once pytest checks the types of what is imported."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        session.config.pluginmanager.register(Mutation(self.path), "mutation")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
