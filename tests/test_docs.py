"""The documentation builds without a warning and without a network, and what it says runs."""

from __future__ import annotations

import contextlib
import doctest
import functools
import http.server
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import launched
from public import FUNCTIONS

import tl_contextmix as cm

pytestmark = pytest.mark.newest

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


def test_documentation_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(METHODS) + 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", text
        )
        assert fetched == [], page.name


def test_reference_holds_every_public_name(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    # mkdocstrings gives every object that it documents an id.
    shown = set(re.findall(r'id="(tl_contextmix\.[\w.]+)"', text))
    public = {name: getattr(cm, name) for name in cm.__all__} | FUNCTIONS
    for name, found in public.items():
        home = inspect.unwrap(found).__module__
        assert f"{home}.{name}" in shown, name


def test_equations_are_readable_without_a_script(site: Path) -> None:
    pages = {page.name: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    text = "".join(pages.values())
    for raw in (".. math", ":math:", "arithmatex", "$$"):
        assert raw not in text
    assert all("<math" in pages[f"{path.stem}.html"] for path in METHODS)
    # SyntaxError of an equation would be shown as its LaTeX.
    assert not re.search(r"<m[ino][^>]*>\\\\?[a-z]+<", text)


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site on loopback: browsers let no page of a file read the index of the search."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def test_every_page_opens_on_a_phone_without_an_error_or_a_request(site: Path) -> None:
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert {"faq.html", "tutorials/index.html", "api/ContextMap.html"} <= set(pages)
    problems: list[str] = []

    def asked(request: Any) -> None:
        if not request.url.startswith((site.as_uri(), "blob:", "data:")):
            problems.append(request.url)

    with launched() as browser:
        page = browser.new_context(viewport={"width": 400, "height": 800}, offline=True).new_page()
        page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
        page.on("request", asked)
        for name in pages:
            if name == "404.html":  # its links are those of the place it is shown at
                continue
            page.goto((site / name).as_uri(), wait_until="domcontentloaded")
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > 400:
                problems.append(f"{name} is {wide} px wide")
    assert problems == []


def test_search_finds_every_page(site: Path, served: str) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in found["docs"]}
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert pages <= places
    with launched() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(served)
        page.focus("input.md-search__input")  # it reads its index then, and misses words before
        page.get_by_text("Type to start searching").wait_for(state="attached")
        # It asks at each key, so typed letters may show the answer to "l" first.
        page.keyboard.insert_text("left padding numbers")
        page.keyboard.press("End")
        page.wait_for_selector(".md-search-result__link[href*='faq.html']", state="attached")


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


EXPLAINED = {
    "ALTI": "aggregation of layer-wise token-to-token",
    "ATB": "attention block",
    "BOS": "beginning",
    "CTC": "connectionist temporal",
    "DLA": "direct logit attribution",
    "FFN?": "feed-forward",
    "FLOPs?": "floating-point operations",
    "KL": "kullback-leibler",
    "LN": "layernorm",
    "MDL": "minimum description length",
    "MRR": "mean reciprocal rank",
    "NLL": "negative log-likelihood",
    "OV": "output-value",
    "PEFT": "parameter-efficient",
    "P-?CXMI": "pointwise conditional cross-mutual",
    "QK": "query-key",
    "RES": "residual",
    "SAEs?": "sparse autoencoder",
}
"""Abbreviations, and the words that a page has for one where it uses it first."""


def _prose(page: Path) -> str:
    """A page without code, equations and the addresses of links."""
    text = page.read_text(encoding="utf-8")
    for left_out in (r"```.*?```", r"\$\$.*?\$\$", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(left_out, "", text, flags=re.DOTALL)
    return " ".join(text.split())


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))], ids=lambda path: path.stem
)
def test_abbreviations_are_explained_where_they_first_stand(page: Path) -> None:
    text = _prose(page)
    for short, words in EXPLAINED.items():
        first = re.search(rf"\b{short}\b", text)
        if first is not None:
            # In the same sentence, or the next one where it stands in a heading or a table.
            before = text[: first.end() + 200].lower()
            assert words in before, f"{first[0]}: ...{text[max(0, first.start() - 60) :][:160]}"


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda path: path.stem)
def test_examples_of_the_pages_run(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        assert "assert " in code, "an example checks what it says"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), {})


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
