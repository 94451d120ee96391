"""The papers, reproduced in small: every script runs, and what is published is what was found."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "reproductions"))

import claims  # noqa: E402

pytestmark = pytest.mark.once

SCRIPTS = {
    "decoder_lens": ["--task", "mt,logic,asr", "--steps", "2", "--limit", "2"],
    "feed_forward_maps": ["--model", "causal-lm", "--limit", "3"],
    "feed_forward_memories": ["--limit", "16", "--draws", "2"],
    "log_prob_increase": ["--limit", "3", "--neurons", "3"],
    "norms": ["--model", "masked-lm", "--limit", "3"],
    "value_zeroing": ["--model", "masked-lm", "--limit", "2", "--texts", "24", "--seeds", "1"],
}


def test_there_is_a_script_for_every_file_that_is_published() -> None:
    scripts = {path.stem for path in (ROOT / "reproductions").glob("*.py")}
    assert {*SCRIPTS} == scripts - {"claims", "tiny_tasks"}
    assert {*SCRIPTS} == {one["script"] for one in claims.stored()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_scores_its_claims(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    found = module.main([*SCRIPTS[name], "-o", str(tmp_path)])
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == found
    assert found["claims"][0]["words"] in (tmp_path / f"{name}.html").read_text("utf-8")
    published = next(one for one in claims.stored() if one["script"] == name)
    names = {one["name"] for one in published["claims"]}
    assert {one["name"] for one in found["claims"]} <= names
    for one in [*found["claims"], *published["claims"]]:
        assert one["verdict"] == verdict(one), one["name"]


def verdict(one: dict[str, Any]) -> str:
    """What follows from an interval and a bound."""
    low, high = (math.nan if one[end] is None else one[end] for end in ("low", "high"))
    if one["count"] >= 6 and low > one["above"]:
        return "holds"
    return "does not hold" if one["count"] >= 6 and high < one["above"] else "cannot be said here"


def test_the_page_shows_what_was_found() -> None:
    page = claims.PAGE.read_text("utf-8")
    assert claims.rewritten(page) == page
    assert page.count("| cannot be said here |") >= 1
    assert page.count("| does not hold |") >= 1


def test_a_verdict_needs_the_whole_interval() -> None:
    claim = claims.Claim("c", "words", "place", "figure", 0.5)
    rows = [(0.7, 0.6, 0.8, 9), (0.3, 0.2, 0.4, 9), (0.6, 0.4, 0.8, 9), (0.7, 0.7, 0.7, 5)]
    found = [claims.Scored(claim, "model", *row).verdict for row in rows]
    assert found == ["holds", "does not hold", "cannot be said here", "cannot be said here"]
    nothing = claims.Scored(claim, "model", math.nan, math.nan, math.nan, 9)
    assert nothing.verdict == "cannot be said here"
