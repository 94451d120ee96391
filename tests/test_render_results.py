"""Every public result shows itself: in a notebook, as text, and as a figure."""

from __future__ import annotations

import importlib
import inspect
import operator
import pkgutil
import re
from typing import Any

import pytest
from hostile import HOSTILE
from shown import every_class

import tl_contextmix as cm
from tl_contextmix import results
from tl_contextmix.plotting.panels import Table
from tl_contextmix.results import Score
from tl_contextmix.results.base import Result, Shown

pytestmark = pytest.mark.once

EXAMPLES = every_class()
EACH = [pytest.param(result, id=kind.__name__) for kind, result in EXAMPLES.items()]
# Public classes that are no results: what one asks with, errors, and pieces of results.
NO_RESULTS = {
    *("ContextMixError", "ContextMixWarning", "FileFormatError", "InvalidInput"),
    *("UnsupportedModel", "Dictionary", "Direction", "MinimalPair"),
    *("Components", "Cost", "CurvePoint", "Pair", "Pattern", "Provenance", "Result", "ScoreRow"),
    *("DifferenceRow", "EstimatePart", "GraphNode", "Tokens", "Trigger"),
    # Base classes.
    *("ComponentSet", "LabelledArray", "Mined", "RowTable", "ScoreTable"),
}


def _public() -> dict[str, type]:
    """Every class that users can name, and every result wherever it is defined."""
    named = [(name, getattr(part, name)) for part in (cm, results) for name in part.__all__]
    for found in pkgutil.walk_packages(cm.__path__, "tl_contextmix."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    named += [(kind.__name__, kind) for kind in _below(Shown)]
    return {name: kind for name, kind in named if inspect.isclass(kind)}


def _below(kind: type) -> list[type]:
    return [one for part in kind.__subclasses__() for one in (part, *_below(part))]


def test_every_public_class_shows_itself_or_is_no_result():
    public = {name: kind for name, kind in _public().items() if kind.__module__ != __name__}
    silent = {name for name, kind in public.items() if not issubclass(kind, Shown)}
    assert silent <= NO_RESULTS, f"{silent - NO_RESULTS} have no display: make them Shown"
    missing = set(public) - NO_RESULTS - {kind.__name__ for kind in EXAMPLES}
    assert not missing, f"tests/shown.py has no example of {missing}"
    assert set(EXAMPLES) == set(public.values()) - {public[n] for n in NO_RESULTS if n in public}


def test_a_result_without_a_display_would_be_seen():
    class Silent(Result):
        pass

    assert Silent in _below(Shown)
    with pytest.raises(NotImplementedError):
        Silent()._repr_mimebundle_()


@pytest.mark.parametrize("result", EACH)
def test_a_notebook_gets_a_page_a_picture_and_text(result: Any):
    bundle = result._repr_mimebundle_()
    assert (
        {"text/html", "text/plain"}
        <= set(bundle)
        <= {*("text/html", "text/plain", "image/svg+xml")}
    )
    assert bundle == result._repr_mimebundle_(), "the same result gives the same bytes"
    assert bundle["text/html"] == result._repr_html_()
    heading, *lines = bundle["text/plain"].splitlines()
    assert heading == repr(result).splitlines()[0]
    assert len([line for line in lines if line.strip()]) >= 2
    assert "tensor(" not in bundle["text/plain"]
    bundle["text/plain"].encode()  # half a character would be left otherwise
    for mark in ("http://", "https://", "url(", "@import"):
        assert (
            mark
            not in bundle["text/html"]
            .replace("http://www.w3.org/2000/svg", "")
            .split("var CircuitsVis=")[0]
        )


@pytest.mark.newest
@pytest.mark.parametrize("result", EACH)
def test_every_panel_is_a_figure(result: Any):
    for place in range(len(result.panels())):
        width, height = result.figure(place).get_size_inches()
        assert 0.5 < width < 40
        assert 0.3 < height < 40


def _headings(panel: Any) -> list[str]:
    """What a panel says in words of its own: titles, axes, units, and names that no user gave."""
    axes = getattr(panel, "axes", ())
    found = [panel.title, getattr(panel, "unit", ""), getattr(panel, "axis", ""), *axes]
    found += [*getattr(panel, "sheets", ()), *(name for name, _ in getattr(panel, "series", ()))]
    table = isinstance(panel, Table) and len(panel.columns) < 12
    columns = panel.columns if table or axes[1:] == ("sublayer",) else ()
    return [one for one in (*found, *columns) if one not in HOSTILE]


# Names in the code of points, kinds of components, methods, levels and metrics, and its
# abbreviations.
_BARE = re.compile(r"\b(\w*[a-z]_[a-z]\w*|(attn|mlp|resid|ffn|embed|dot|kl|max prob)$)")


@pytest.mark.parametrize("result", EACH)
def test_headings_are_words(result: Any):
    for panel in result.panels():
        assert not [heading for heading in _headings(panel) if _BARE.search(heading)]
        named = getattr(panel, "axes", ()) or [getattr(panel, "axis", "none")]
        assert all(named), f"{panel.title}: an axis without a name"


def test_a_heading_that_is_a_name_would_be_seen():
    for bare in ("Contributions, mlp", "attn", "Norms at block_out", "Every method by dot"):
        assert _BARE.search(bare)
    for words in ("feed-forward block", "log p", "embedding", "Knockout of the best components"):
        assert not _BARE.search(words)


def test_a_terminal_prints_no_representation_of_a_class():
    text = EXAMPLES[Score]._repr_mimebundle_()["text/plain"]
    assert "ScoreRow(" not in text


def test_figures_are_added_to_their_like_alone():
    summable: list[Any] = [one for one in EXAMPLES.values() if hasattr(one, "__add__")]
    assert len(summable) == 4
    for one in summable:
        assert type(one + one) is type(one)
        with pytest.raises(TypeError, match="unsupported operand"):
            operator.add(one, 3)
