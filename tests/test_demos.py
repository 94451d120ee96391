"""The notebooks run from top to bottom, and say what they find; what they show is committed."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import PAINTED, launched, opened

from tl_contextmix.plotting import circuitsvis_source, notebooks

pytestmark = pytest.mark.newest

DEMOS = Path(__file__).resolve().parent.parent / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))


def _cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@functools.cache
def _outputs(path: Path) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Runs a notebook: its variables, what it prints, and the pages its cells end in."""
    names: dict[str, Any] = {}
    printed, pages = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        for cell in _cells(path):
            body = ast.parse(cell)
            last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
            exec(compile(body, str(path), "exec"), names)
            if isinstance(last, ast.Expr):
                shown = eval(compile(ast.Expression(last.value), str(path), "eval"), names)
                page = getattr(shown, "_repr_html_", None)
                pages += [] if page is None else [page()]
    return names, printed.getvalue(), tuple(pages)


def _run(path: Path) -> tuple[dict[str, Any], str]:
    return _outputs(path)[:2]


@pytest.mark.every
def test_there_is_a_notebook_for_each_question() -> None:
    assert [path.stem.split("_")[0] for path in NOTEBOOKS] == [*"12345678", "in"]


def test_five_minutes_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "1_context_mixing_in_five_minutes.ipynb")
    best = names["best"]
    # The finding: Value Zeroing points at the noun that decides, attention far less.
    assert names["ahead"] == "value_zeroing"
    assert best.low["value_zeroing"] > best.high["attention_norms attn_out"]
    assert best.low["attention"] > best.chance.iloc[0]
    assert names["table"]["Value Zeroing"].idxmax() == " keys"
    assert "In 15 sentences, value_zeroing puts 9" in printed


def test_comparison_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "6_which_map_should_i_believe.ipynb")
    assert names["first"] == "value_zeroing"
    assert "the intervals are apart" in printed
    # By faithfulness nothing is decided, and through all layers another method is ahead.
    assert len(names["tied"]) == len(names["methods"])
    assert names["whole"].value.idxmax() != "value_zeroing"
    assert names["whole"].value["value_zeroing"] < names["aligned"].value["value_zeroing"] / 2


def test_contrast_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "7_why_this_word.ipynb")
    assert names["odds"]["after"] < names["odds"]["before"] / 2 < names["odds"]["control"]
    assert names["error"] < 1e-4
    pairs = {"clés": "keys", "sont": "are", "rouges": "red"}
    assert {word: names["aligned"][word] for word in pairs} == pairs
    assert names["strongest"] == " are"
    assert "clés from keys, sont from are" in printed


@pytest.mark.every
def test_workflow_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "in_your_transformerlens_workflow.ipynb")
    assert names["checked"].ok
    assert names["same"]
    assert names["error"] < 1e-4
    assert type(names["model"]).__name__ in printed
    assert "most of the last one comes from ' keys'" in printed


_FOLDER = re.compile(r"\S*[/\\]tmp\w+(?=:)")
_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_a_run_shows(path: Path) -> None:
    """``python docs/notebooks.py`` writes it. Other processors may differ in a last digit."""
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    assert outputs
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    pages = [one.data for one in outputs if "image/svg+xml" in one.get("data", {})]
    assert pages or path.stem.startswith(("3_", "in_"))  # texts alone
    assert not any("<iframe" in "".join(page.values()) for page in pages)
    said = "".join(one.text for one in outputs if one.get("name") == "stdout")
    printed, expected = (_FOLDER.sub("folder", text) for text in (said, _run(path)[1]))
    assert _NUMBER.sub("0", printed) == _NUMBER.sub("0", expected)
    kept, new = (
        [float(number) for number in _NUMBER.findall(text)] for text in (printed, expected)
    )
    assert kept == pytest.approx(new, rel=0.02, abs=0.011)


def test_feed_forward_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "2_what_the_feed_forward_block_changes.ipynb")
    assert "100 sentences" in printed
    # The finding: some layer's feed-forward block favours the noun that decides the verb.
    assert names["ratio"].max() > 1.2
    assert names["raised"].max() >= 75
    assert f"layer {names['strongest']}" in printed


def test_fact_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "4_who_wrote_the_answer.ipynb")
    # Layers add up to the model's own log-probability.
    assert abs(names["total"] - float(names["layers"].log_prob[0])) < 1e-5
    assert names["best_layer"] == "L2 attn"
    assert int(names["neurons"].evaluated[0]) < int(names["neurons"].possible[0]) / 20
    # The paper's own score is among the best, and random neurons do nothing.
    table = names["table"]["probability"]
    assert table["log_prob_increase"] < table["before"] - 0.05
    assert table["log_prob_increase"] <= table.drop(["log_prob", "log_prob_increase"]).min()
    assert table["control"] > table["before"] - 0.01
    assert f"by {names['strongest']} take" in printed


def test_decoder_lens_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "5_decoder_lens.ipynb")
    first, table = names["first"], names["table"]
    # The finding: the more context a French word needs, the later its layer.
    assert first["one word"] <= first["agreement"] < first["sense"]
    assert first["agreement"] < first["reordering"]
    assert first["clause"] is None
    assert table.loc["one word", 1] > table.loc["sense", 1] > table.loc["reordering", 1]
    assert names["one"].texts[0][-1] == "la batte brûlait ."
    assert f"sense: right from layer {first['sense']}" in printed
    assert "500 sentences" in printed


def test_memories_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "3_feed_forward_memories_over_a_corpus.ipynb")
    layers = names["layers"]
    # Values agree with their triggers several times as often as chance has it, in every layer.
    assert (layers["low"] > 3 * layers["chance"]).all()
    bins = names["by_probability"]["agreement"]
    assert bins.iloc[-1] > 2 * bins.iloc[0]
    # A memory whose different triggers end alike, and whose value says what comes next.
    best = names["best"]
    assert best.share >= 0.9 > 5 * best.chance
    assert best.contexts == best.triggers == 25
    following = [trigger.next_token for trigger in names["examples"].triggers]
    assert following.count(names["examples"].promotes[0]) >= 0.9 * len(following)
    assert f"L{best.layer}.{best.neuron}, positive: 25 triggers" in printed
    shares = names["fed"].to_dataframe().set_index("source_token")["score"]
    assert shares["keys" if "keys" in shares else " keys"] > 10 * abs(shares[" cabinet"])


def test_what_notebooks_show_is_painted_in_a_browser(tmp_path: Path) -> None:
    library = notebooks._LIBRARY % circuitsvis_source.packed()
    with launched() as browser:
        for path in NOTEBOOKS:
            pages = _outputs(path)[2]
            output = tmp_path / f"{path.stem}.html"
            cells = "<hr>".join([library, *pages])
            output.write_text(f"<!DOCTYPE html><meta charset=utf-8>{cells}", "utf-8")
            with opened(browser, output) as seen:
                frames = [frame for frame in seen.page.frames if frame != seen.page.main_frame]
                for frame in frames:
                    frame.wait_for_function(PAINTED)
                assert len(frames) == sum("<iframe" in page for page in pages)
                assert (seen.errors, seen.requests, seen.dialogs) == ([], [], []), path.name
            assert frames or path.stem.startswith("in_"), path.name


def test_flow_notebook_finds_what_it_says() -> None:
    names, printed = _run(DEMOS / "8_which_way_did_it_come.ipynb")
    assert names["agree"] == {"L2H0", "L3H0"}
    assert names["into"] == pytest.approx(names["graph"].score, abs=1e-4)
    assert names["started"] == pytest.approx(names["graph"].score, abs=1e-4)
    # The last head's effect is what its ablation takes; the one before it moves patterns, too.
    table, looks = names["table"], names["looks"]
    assert table.flow["L3H0"] == pytest.approx(table.ablation["L3H0"], rel=0.1)
    assert table.ablation["L2H0"] > 3 * table.flow["L2H0"]
    assert (looks["as it is"] - looks["without L2H0"]).abs().max() > 0.3
    assert "L2H0 and L3H0 first" in printed
