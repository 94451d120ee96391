"""The documentation builds without a warning and without a network, and what it says runs."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from public import FUNCTIONS

import tl_contextmix as cm

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"
METHODS = sorted((PAGES / "methods").glob("*.md"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; a warning ends the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.mark.newest
def test_documentation_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(METHODS) + 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", text
        )
        assert fetched == [], page.name


@pytest.mark.newest
def test_reference_holds_every_public_name(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    # mkdocstrings gives every object that it documents an id.
    shown = set(re.findall(r'id="(tl_contextmix\.[\w.]+)"', text))
    public = {name: getattr(cm, name) for name in cm.__all__} | FUNCTIONS
    for name, found in public.items():
        home = inspect.unwrap(found).__module__
        assert f"{home}.{name}" in shown, name


@pytest.mark.newest
def test_equations_are_readable_without_a_script(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    assert ".. math" not in text
    assert ":math:" not in text


@pytest.mark.newest
@pytest.mark.parametrize("page", METHODS, ids=lambda path: path.stem)
def test_method_pages_are_whole(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert [h for h in headings if h not in ("Points", "Results")] == [
        *("Equation", "Example", "Pitfalls", "Cost", "Reference"),
    ]
    figures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert figures or page.stem == "comparison"
    assert all((page.parent / figure).exists() for figure in figures)


@pytest.mark.newest
@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda path: path.stem)
def test_examples_of_the_pages_run(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        assert "assert " in code, "an example checks what it says"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), {})


@pytest.mark.newest
def test_public_docstrings_that_show_code_run() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    finder = doctest.DocTestFinder()
    seen: set[str] = set()
    for found in pkgutil.walk_packages(cm.__path__, "tl_contextmix."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for test in finder.find(module, module.__name__):
            if test.examples and inspect.getmodule(module) is not None:
                seen.add(test.name)
                runner.run(test)
    assert "tl_contextmix.engine.citations.cite" in seen
    assert runner.summarize().failed == 0
