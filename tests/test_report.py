"""The report and the command line that writes it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_render import Parsed

from tl_contextmix import __main__ as command_line
from tl_contextmix.decompose import POINTS
from tl_contextmix.errors import ContextMixWarning, InvalidInput, UnsupportedModel
from tl_contextmix.hosts import as_view, check
from tl_contextmix.loading import load_demo
from tl_contextmix.methods.changes import amplified_pairs, contextualization_change
from tl_contextmix.methods.ff_memories import ff_memories
from tl_contextmix.methods.log_prob import log_prob_contributions
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.token_memory import token_memory
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.render import Page
from tl_contextmix.report import build_report, report, sections, story, write_report
from tl_contextmix.report.story import default_text, read

TEXT = "the keys to the cabinet"
MASKED = "the keys to the cabinet [MASK] old ."
TITLES = [
    "What the model predicts, and from where",
    "Which components wrote the answer",
    "How tokens mix, point by point",
    "What each component changes",
    "Pairs the feed-forward block changes most",
    "How much each token mixes",
    "What each layer loses without a token",
    "Which memories write here",
    "From the input through all layers",
]


@pytest.fixture(scope="module")
def causal() -> Any:
    return load_demo("causal-lm")


@pytest.fixture(scope="module")
def masked() -> Any:
    return load_demo("masked-lm")


def titles(page: Page) -> list[str]:
    return [section.title for section in page.sections]


def finding(page: Page, title: str) -> str:
    return next(section.finding for section in page.sections if section.title == title)


# ---- the report


def test_report_tells_the_story_of_a_causal_model(causal):
    page = build_report(causal, TEXT)
    assert titles(page) == TITLES
    told = finding(page, TITLES[0])
    # The plural verb, and that the vector it is read from took most from the plural noun.
    assert told.startswith("After “cabinet” the model says “are”")
    assert told.endswith("of “cabinet” comes from “keys”.")
    assert all(section.text for section in page.sections)
    facts = dict(page.facts)
    assert facts["Text"] == TEXT
    assert facts["Model"] == "causal-lm"
    assert facts["Weights"] == "as published"
    assert type(causal).__name__ in facts["Class"]


def test_report_shows_the_maps_of_every_scope(causal):
    parsed = Parsed(build_report(causal, TEXT).html())
    maps = attention_norms(causal, TEXT, at=POINTS)
    charts = [chart["props"] for chart in parsed.charts()]
    # resid_post and block_out are the same map in a pre-LN model.
    for point, props in zip(POINTS[:5], charts, strict=False):
        expected = maps[point].normalize().scores[0, :, 0]
        torch.testing.assert_close(torch.tensor(props["attention"]), expected, rtol=1e-3, atol=1e-6)
        assert props["maskUpperTri"] is True
        assert props["attentionHeadNames"] == [f"layer {layer}" for layer in range(4)]
    difference, zeroing, rollout = charts[5:]
    change = maps["mlp_out"].normalize().scores - maps["mlp_in"].normalize().scores
    torch.testing.assert_close(
        torch.tensor(difference["attention"]), change[0, :, 0], rtol=1e-3, atol=1e-6
    )
    zeroed = value_zeroing(causal, TEXT).normalize().scores[0, :, 0]
    torch.testing.assert_close(torch.tensor(zeroing["attention"]), zeroed, rtol=1e-3, atol=1e-6)
    rolled = maps["block_out"].normalize().rollout().scores[0, :, 0]
    torch.testing.assert_close(
        torch.tensor(rollout["attention"]), rolled.flip(0), rtol=1e-3, atol=1e-6
    )
    assert rollout["attentionHeadNames"] == ["0 to 3", "0 to 2", "0 to 1", "0 to 0"]


def test_report_shows_what_the_components_change(causal):
    page = build_report(causal, TEXT)
    maps = attention_norms(causal, TEXT, at=POINTS)
    by_title = {panel.title: panel for section in page.sections for panel in section.panels}
    (expected,) = contextualization_change(maps).panels()
    assert by_title[expected.title] == expected
    undone = by_title["Does the block undo what FF changed?"]
    assert [name for name, _ in undone.series] == ["cancel", "recover"]
    pairs = amplified_pairs(maps["mlp_in"], maps["mlp_out"], k=3)
    table = by_title["Pairs that changed most: amplified"]
    assert "sentence" not in table.columns
    assert [row[-1] for row in table.rows] == [pair.change for pair in pairs.amplified]
    ratios = by_title["Mixing ratio at block_out"]
    figures = mixing_ratio(causal, TEXT, at="block_out")
    torch.testing.assert_close(ratios.values[0], figures.values[0])
    top = max(pairs.amplified, key=lambda pair: pair.change)
    told = finding(page, TITLES[4])
    assert f"“{top.source_token.strip()}” for “{top.target_token.strip()}”" in told
    assert f"layer {top.layer}, from {top.before:.0%} to {top.after:.0%}" in told


def test_report_says_which_components_wrote_the_answer(causal):
    page = build_report(causal, TEXT)
    section = next(part for part in page.sections if part.title == TITLES[1])
    layers = log_prob_contributions(causal, TEXT)
    best = layers.top(1)
    told = f"comes most from {best.labels()[0]} ({float(best.scores[0, 0]):+.2f} nats)"
    assert told in section.finding
    steps = next(panel for panel in section.panels if "through the layers" in panel.title)
    assert steps.series[0][1] == tuple(layers.trajectory[0].tolist())
    table = section.panels[-1]
    neurons = log_prob_contributions(causal, TEXT, by="ff_neuron", top_k=10)
    assert tuple(row[0] for row in table.rows) == neurons.labels()
    by_position = next(panel for panel in section.panels if "by position" in panel.title)
    assert by_position.columns == layers.tokens.strings[0]


def test_report_says_what_the_focus_loses_most_without(causal):
    page = build_report(causal, TEXT)
    row = value_zeroing(causal, TEXT).normalize().select(target=-1)
    top = max(
        (found for found in row.top(30) if found["source"] != len(row.source.strings[0]) - 1),
        key=lambda found: found["score"],
    )
    told = finding(page, TITLES[6])
    assert f"loses most without “{top['source_token'].strip()}”: {top['score']:.0%}" in told
    assert told.endswith(f"in layer {top['layer']}.")


def test_report_names_the_memories_that_write(causal):
    page = build_report(causal, "the keys to the cabinet")
    section = next(s for s in page.sections if s.title == "Which memories write here")
    table = section.panels[0]
    found = ff_memories(causal, "the keys to the cabinet")
    top = found.top(3, pos=-1)
    assert [row[:2] for row in table.rows] == [
        (f"L{row.layer}.{row.neuron}", row.promotes) for row in top.itertuples()
    ]
    longest = top.loc[top["length"].idxmax()]
    assert f"L{longest.layer}.{longest.neuron}" in section.finding
    shares = token_memory(causal, "the keys to the cabinet", layer=0, pos=-1)
    first = shares.shares[0, 0, 0, :, int(top["neuron"][0])]
    assert table.rows[0][5] == pytest.approx(float(first[first.abs().argmax()]), rel=1e-4)


def test_report_of_a_masked_model_is_about_the_mask(masked):
    page = build_report(masked, MASKED)
    assert titles(page) == TITLES
    assert finding(page, TITLES[0]).startswith("At “[MASK]” the model says “")
    props = [chart["props"] for chart in Parsed(page.html()).charts()]
    assert len(props) == 6 + 3
    assert all(chart["maskUpperTri"] is False for chart in props)


def test_report_without_a_mask_predicts_nothing(masked):
    assert titles(build_report(masked, "the keys to the cabinet are old .")) == [
        *TITLES[2:7],
        TITLES[8],
    ]


@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no encoder-decoder that works")
def test_report_of_an_encoder_decoder_maps_the_encoder():
    model = load_demo("encoder-decoder")
    page = build_report(model, "the bat burned .")
    lens = "What the decoder says after each layer"
    assert titles(page) == [*TITLES[:7], TITLES[8], lens]
    section = next(section for section in page.sections if section.title == lens)
    table, judged, *curves = section.panels
    assert [row[0] for row in table.rows] == [0, 1, 2, 3, 4]
    assert table.rows[-1][1] == "la batte brûlait ."
    assert all(0 < row[2] <= 1 for row in table.rows)
    assert judged.rows[-1] == "layer 4"
    assert [curve.title for curve in curves] == ["edit distance", "gold NLL"]
    assert curves[0].series[0][1][-1] == 0, "the last layer's output is the final one"
    assert len(page.html().encode()) < 3 * 2**20
    assert dict(page.facts)["Maps of"] == "the encoder"
    parsed = Parsed(page.html())
    assert not any(chart["props"]["maskUpperTri"] for chart in parsed.charts())
    decoder = attention_norms(model, "the bat burned .").normalize()
    panel = page.sections[0].panels[1]
    torch.testing.assert_close(panel.values[0], decoder.scores[0, :, 0, -1])
    assert panel.columns == decoder.source.strings[0]


def test_report_is_small_offline_and_always_the_same(causal):
    first, second = (build_report(causal, TEXT).html() for _ in range(2))
    assert first == second
    assert len(first.encode()) < 3_000_000
    parsed = Parsed(first)
    places = [a.get("src") or a.get("href") or "#" for _, a in parsed.tags]
    assert all(place.startswith(("#", "data:")) for place in places)
    assert len(parsed.programs()) == 2


def test_findings_survive_text_that_is_markup(masked):
    with pytest.warns(ContextMixWarning, match="never saw"):
        page = build_report(masked, "<img src=x onerror=alert(1)> [MASK] </script>")
    parsed = Parsed(page.html())
    assert not [attrs for attrs in parsed.all("img") if "onerror" in attrs]
    assert len(parsed.programs()) == 2


def test_default_texts_suit_the_models(causal, masked):
    assert default_text(causal) == TEXT
    assert default_text(masked) == MASKED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (causal, masked):
            read(model, default_text(model))


def test_foreign_words_are_named(causal):
    with pytest.warns(ContextMixWarning, match=r"'politician', 'sneezed'; expected words"):
        read(causal, "the politician sneezed , the sneezed <s> keys")


def test_report_takes_one_text(causal):
    with pytest.raises(InvalidInput, match="one sentence"):
        read(causal, [TEXT, TEXT])


def test_points_a_model_lacks_are_left_out_with_the_reason(causal, monkeypatch):
    def without_feed_forward(model: Any, text: str, *, at: Any, stack: Any) -> Any:
        asked = [at] if isinstance(at, str) else at
        if set(asked) - {"attn_out", "resid_mid"}:
            raise UnsupportedModel("these neurons cannot be read")
        return attention_norms(model, text, at=at, stack=stack)

    monkeypatch.setattr(story, "attention_norms", without_feed_forward)
    page = build_report(causal, TEXT)
    assert titles(page) == [TITLES[0], TITLES[1], TITLES[2], TITLES[5], TITLES[8]]
    assert "these neurons cannot be read" in page.sections[2].text
    assert page.html()


def test_a_model_without_any_map_is_refused(causal, monkeypatch):
    def refuse(*args: Any, **options: Any) -> Any:
        raise UnsupportedModel("nothing can be read")

    monkeypatch.setattr(story, "attention_norms", refuse)
    with pytest.raises(UnsupportedModel, match="nothing can be read"):
        build_report(causal, TEXT)


def test_a_model_without_readout_predicts_nothing(causal):
    told = read(causal, TEXT)
    view = told.done.view
    silent = replace(view, readout=replace(view.readout, refusal="no trained head"))
    assert (
        sections.SECTIONS["predictions"](replace(told, done=replace(told.done, view=silent)))
        is None
    )


# ---- files


def test_write_report_takes_a_name_or_a_model(causal, tmp_path):
    first = write_report("causal-lm", path=tmp_path / "first.html")
    second = write_report(causal, TEXT, tmp_path / "second.html", title="Context-mixing report")
    assert first == tmp_path / "first.html"
    assert first.read_bytes() == second.read_bytes()


def test_report_shows_any_results(causal, tmp_path):
    maps = attention_norms(causal, TEXT, at=POINTS)
    results = [
        maps["block_out"],
        contextualization_change(maps),
        amplified_pairs(maps["mlp_in"], maps["mlp_out"], k=2),
        mixing_ratio(causal, TEXT),
        check(causal),
    ]
    path = report(results, tmp_path / "results.html", title="Mine")
    parsed = Parsed(path.read_text(encoding="utf-8"))
    view = as_view(causal)
    for part in ("Mine", "attention_norms(at='block_out'", f"{view.host} {view.host_version}"):
        assert part in parsed.text
    assert "IdentityReport" in parsed.text
    assert len(parsed.charts()) == 1
    alone = report(maps["block_out"], tmp_path / "alone.html")
    assert len(Parsed(alone.read_text(encoding="utf-8")).charts()) == 1


def test_report_of_no_result_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="a str; expected results"):
        report(["text"], tmp_path / "page.html")


def test_results_show_themselves(causal):
    shown = attention_norms(causal, TEXT).show()
    assert isinstance(shown, Page)
    assert shown.title == "ContextMap"
    assert len(Parsed(shown.html()).charts()) == 1


# ---- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> tuple[int, list[str], list[str]]:
        code = command_line.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def test_command_report_writes_a_page_and_prints_its_path(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report")
    assert (code, out, err) == (0, ["tl_contextmix_report.html"], [])
    assert "“keys”" in (tmp_path / "tl_contextmix_report.html").read_text(encoding="utf-8")


def test_command_report_options(run, tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(command_line.webbrowser, "open", opened.append)
    path = tmp_path / "page.html"
    text = "the author that the senators admire"
    code, out, err = run("report", "--model", "masked-lm", "--text", text, "-o", path, "--open")
    assert (code, out, err) == (0, [str(path)], [])
    assert opened == [path.as_uri()]
    parsed = Parsed(path.read_text(encoding="utf-8"))
    assert text in parsed.text
    assert "masked-lm" in parsed.text


def test_command_shows_warnings_on_one_line(run, tmp_path):
    code, out, err = run("report", "--text", "the politician", "-o", tmp_path / "page.html")
    assert code == 0
    assert len(out) == len(err) == 1
    assert err[0].startswith("tl-contextmix: warning: causal-lm never saw")
    assert "test_report" not in err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "--model", "no such model"), "Cannot load the model"),
        (("report", "--text", ""), "empty"),
        (("report", "-o", "missing/folder/page.html"), "the page cannot be written"),
        (("check", "no such model"), "Cannot load the model"),
    ],
)
def test_command_errors_are_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith("tl-contextmix: error: ")
    assert message in err[0]


def test_command_check_prints_the_identities(run, causal):
    code, out, err = run("check", "causal-lm")
    assert (code, err) == (0, [])
    assert out == str(check(causal)).splitlines()


def test_command_check_fails_where_an_identity_does(run, causal, monkeypatch):
    found = check(causal)
    broken = replace(found, rows=(replace(found.rows[0], error=1.0), *found.rows[1:]))
    monkeypatch.setattr(command_line, "check", lambda model: broken)
    code, out, _ = run("check", "causal-lm")
    assert code == 1
    assert "FAIL" in "".join(out)


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["check"], ["report", "--unknown"]])
def test_command_mistakes_exit_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        command_line.main(arguments)
    assert left.value.code == 2
    assert "usage: tl-contextmix" in capsys.readouterr().err


def test_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tl_contextmix", "--version"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("tl-contextmix ")
