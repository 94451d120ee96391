"""README's examples print what it says. ``python tests/test_readme.py`` rewrites it.

The long table of models in the documentation as well.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import zoo
from support import summary, table

from tl_contextmix.plotting import circuitsvis_source
from tl_contextmix.results import ContextMap
from tl_contextmix.results.base import Shown

README = Path(__file__).resolve().parent.parent / "README.md"
MODELS = README.parent / "docs" / "pages" / "models.md"
SUPPORT = re.compile(r"(<!-- support -->\n).*?(<!-- end of support -->)", re.DOTALL)
# A Python block followed by what it prints.
EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```\n(```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def rerun(text: str) -> str:
    """Returns README with every example's output as it is now; the examples share their names."""
    return _rerun(text)[0]


@functools.cache
def _rerun(text: str) -> tuple[str, dict[str, object]]:
    names: dict[str, object] = {}

    def run(found: re.Match[str]) -> str:
        if zoo.major() == 2 and "encoder-decoder" in found["code"]:
            return found[0]  # no class of TransformerLens 2 reads it right
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(found["code"], str(README), "exec"), names)
        shown = f"```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{found['code']}```\n{shown}"

    supported = SUPPORT.sub(lambda found: f"{found[1]}{summary()}\n{found[2]}", text)
    return EXAMPLE.sub(run, supported), names


def _outputs(text: str, keep: Callable[[str], bool] = bool) -> list[str]:
    return [found["output"] for found in EXAMPLE.finditer(text) if keep(found["output"] or "")]


def test_examples_print_what_readme_says() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(_outputs(text)) == 10, "one for each question"
    assert _outputs(rerun(text)) == _outputs(text)


def test_as_a_notebook_the_examples_are_light() -> None:
    """Every result that they make, shown, and CircuitsVis once."""
    _, names = _rerun(README.read_text(encoding="utf-8"))
    results = [one for one in names.values() if isinstance(one, Shown)]
    cells = [len(json.dumps(one._repr_mimebundle_())) for one in results]
    assert len(results) >= 9
    assert sum(cells) + len(circuitsvis_source.packed()) < 2_000_000
    maps = [one for one in results if isinstance(one, ContextMap)]
    assert maps
    assert all(len(one._repr_html_()) < 100_000 for one in maps)


def test_support_tables_are_those_of_the_tests() -> None:
    for path, rows in ((README, summary()), (MODELS, table())):
        text = path.read_text(encoding="utf-8")
        assert f"<!-- support -->\n{rows}\n<!-- end of support -->" in text


def test_every_file_it_links_to_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert "docs/images/report.png" in links
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert missing == []


def test_there_are_exactly_two_set_up_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"<!-- (\w+) command -->\n```bash\n.+\n```", text) == ["main", "test"]
    assert text.count("```bash") == 2


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    README.write_text(rerun(README.read_text(encoding="utf-8")), encoding="utf-8")
    pages = MODELS.read_text(encoding="utf-8")
    pages = SUPPORT.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", pages)
    MODELS.write_text(pages, encoding="utf-8")
