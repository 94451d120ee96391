"""The report and the command line that writes it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import warnings
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
import unchecked
import zoo
from test_render import Parsed

import tl_contextmix as cm
from tl_contextmix import __main__ as command_line
from tl_contextmix.adapters import as_view
from tl_contextmix.commands import on_texts, shared_options
from tl_contextmix.engine.citations import sources
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.plotting import Opening, Page, Section, colors
from tl_contextmix.plotting.panels import Bars, Curves, Heatmap, Samples, Table
from tl_contextmix.reporting import (
    drawing,
    mixing_section,
    sections,
    story,
    write_report,
    write_results,
)
from tl_contextmix.reporting.sections import SectionName
from tl_contextmix.reporting.story import default_text, read

pytestmark = pytest.mark.mostly_once

TEXT = "the keys to the cabinet"
MASKED = "the keys to the cabinet [MASK] old ."
QUESTIONS = {
    "prediction": "What does the model predict?",
    "answer": "What was each word of the answer made of?",
    "mixing": "Which tokens were mixed, and where?",
    "points": "How do tokens mix, point by point?",
    "feed-forward": "What did the feed-forward block change?",
    "memories": "Which memories fired, and what triggers them?",
    "components": "Which components wrote the answer?",
    "graph": "How did the answer come about?",
    "encoder-layers": "What does each encoder layer already know?",
    "comparison": "Which map to believe?",
}


@pytest.fixture(scope="module")
def page(causal: Any) -> Page:
    """The whole story of the causal model, told once."""
    return cm.report(causal, TEXT)


Shown = TypeVar("Shown", Bars, Curves, Heatmap, Table)


def part(page: Page, name: str) -> Section:
    return next(section for section in page.sections if section.title == QUESTIONS[name])


def shown(section: Section, kind: type[Shown], place: int = 0) -> Shown:
    panel = section.panels[place]
    assert isinstance(panel, kind)
    return panel


def titled(section: Section, title: str) -> Any:
    return next(panel for panel in section.panels if title in panel.title)


def left_out(page: Page) -> dict[str, str]:
    last = page.sections[-1]
    if last.title != "What is not on this page":
        return {}
    return {str(name): str(why) for name, why in shown(last, Table).rows}


# ---- the story


def test_the_story_is_told_in_order(page):
    told = ["prediction", "mixing", "feed-forward", "memories", "components", "graph"]
    told.append("comparison")
    assert [section.title for section in page.sections[:-1]] == [QUESTIONS[name] for name in told]
    for name in told:
        section = part(page, name)
        assert section.text, "how to read it"
        assert section.finding, "what is to be seen"
        assert section.citation or name == "prediction"
    assert left_out(page) == {"encoder-layers": "the model has no encoder and decoder"}
    # The headings with their findings stand at the top: the story in a few lines.
    text = " ".join(Parsed(page.html()).text.split())
    assert text.index(part(page, "comparison").finding) < text.index(part(page, "mixing").text)


def test_facts_say_what_it_is_about(page, causal):
    facts = dict(page.facts)
    assert facts["Text"] == TEXT
    assert facts["Model"] == "causal-lm"
    assert facts["Weights"] == "as published"
    assert type(causal).__name__ in facts["Class"]


def test_citations_are_those_of_cite(page):
    told = " ".join(section.citation for section in page.sections)
    for key in ("kobayashi2024analyzing", "mohebbi2023quantifying", "geva2021transformer"):
        assert sources(key) in told
    assert sources("yu2024neuron") in part(page, "components").citation


def test_prediction_is_the_models_own(page, causal):
    section = part(page, "prediction")
    logits = causal(causal.to_tokens(TEXT))[0]
    probabilities = logits.detach().float().softmax(-1)
    top = probabilities[-1].topk(8)
    bars = shown(section, Bars)
    assert bars.labels == tuple(causal.tokenizer.decode(one) for one in top.indices)
    torch.testing.assert_close(torch.tensor(bars.series[0][1]), top.values, rtol=1e-4, atol=1e-6)
    assert section.finding.startswith("After “cabinet” the model predicts “are” (41%; then “were”")
    way = titled(section, "along the text")
    assert [row[3] for row in way.rows] == [" the", " keys", " to", " the", " cabinet"]
    came = causal.to_tokens(TEXT)[0, 1:]
    for place, row in enumerate(way.rows):
        assert row[4] == pytest.approx(float(probabilities[place, came[place]]), rel=1e-3)


def test_mixing_shows_the_maps(page, causal):
    parsed = Parsed(cm.report(causal, TEXT, sections=["mixing"]).html())
    maps = cm.attention_norms(causal, TEXT, at=POINTS)
    expected = [
        maps["attn_out"].normalize().scores,
        maps["block_out"].normalize().scores,
        cm.value_zeroing(causal, TEXT).normalize().scores,
        maps["block_out"].normalize().rollout().scores.flip(1),
    ]
    shown_maps = parsed.maps()[:4]
    for told, scores in zip(shown_maps, expected, strict=True):
        seen = told["values"].nan_to_num(0.0)
        torch.testing.assert_close(seen, scores[0, :, 0].float(), rtol=1e-3, atol=1e-6)
        assert told["causal"] is True
    # One choice of layer drives all of them, rollouts too.
    assert shown_maps[-1]["sheets"] == ["0 to 3", "0 to 2", "0 to 1", "0 to 0"]
    assert shown_maps[-1]["layers"] == [3, 2, 1, 0]
    row = titled(part(page, "mixing"), "Sources of “cabinet” by layer")
    torch.testing.assert_close(row.values[0], expected[1][0, :, 0, -1])
    # The finding: in which layer the predicting token takes most from another one.
    share, layer, source = max(
        (float(row.values[0, layer, source]), layer, source)
        for layer in range(4)
        for source in range(len(row.columns) - 1)
    )
    assert part(page, "mixing").finding == (
        f"In layer {layer}, {share:.0%} of “cabinet” comes from “{row.columns[source].strip()}”."
    )
    # Maps open where that is.
    assert part(page, "mixing").opens == Opening(layer, 5)
    figures = cm.mixing_ratio(causal, TEXT, at="block_out")
    torch.testing.assert_close(
        titled(part(page, "mixing"), "Mixing ratio").values[0], figures.values[0]
    )


def test_points_are_told_when_asked_for(causal):
    section = part(cm.report(causal, TEXT, sections=["points"]), "points")
    maps = cm.attention_norms(causal, TEXT, at=POINTS)
    # resid_post and block_out are the same map in a pre-LN model.
    titles = [panel.title for panel in section.panels]
    for title, point in zip(
        titles, [*POINTS[:4], "resid_post, here the same as block_out"], strict=True
    ):
        assert title.endswith(f"({point})")
    for place, point in enumerate(POINTS[:5]):
        panel = shown(section, Heatmap, place)
        torch.testing.assert_close(panel.values, maps[point].normalize().scores[0, :, 0])


def test_feed_forward_shows_what_changes(page, causal):
    section = part(page, "feed-forward")
    maps = cm.attention_norms(causal, TEXT, at=POINTS)
    (expected,) = cm.contextualization_change(maps).panels()
    assert titled(section, expected.title) == expected
    undone = titled(section, "Does the block undo")
    assert [name for name, _ in undone.series] == ["cancel", "recover"]
    change = maps["mlp_out"].normalize().scores - maps["mlp_in"].normalize().scores
    torch.testing.assert_close(
        titled(section, "after the feed-forward block").values, change[0, :, 0]
    )
    pairs = cm.amplified_pairs(maps["mlp_in"], maps["mlp_out"], k=2)
    table = titled(section, "Pairs")
    assert sorted(row[-1] for row in table.rows) == sorted(
        pair.change for pair in (*pairs.amplified, *pairs.suppressed)
    )
    top = max(pairs.amplified, key=lambda pair: pair.change)
    assert f"“{top.source_token.strip()}” for “{top.target_token.strip()}”" in section.finding
    assert f"layer {top.layer}, from {top.before:.0%} to {top.after:.0%}" in section.finding


def test_memories_are_named_and_triggered(page, causal):
    section = part(page, "memories")
    table = shown(section, Table)
    top = cm.ff_memories(causal, TEXT).top(3, pos=-1).reset_index(drop=True)
    assert [row[:2] for row in table.rows] == [
        (f"L{row.layer}.{row.neuron}", row.promotes) for row in top.itertuples()
    ]
    memory = cm.token_memory(causal, TEXT, layer=0, pos=-1)
    shares = memory.shares[0, 0, 0, :, int(top["neuron"][0])]
    assert str(table.rows[0][4]).endswith(f"{float(shares[shares.abs().argmax()]):+.2f}")
    longest = top.loc[top["length"].idxmax()]
    name = f"L{longest.layer}.{longest.neuron}"
    assert f"neuron {longest.neuron} of layer {longest.layer}, which promotes" in section.finding
    samples = [panel for panel in section.panels if isinstance(panel, Samples)]
    assert [samples[0].name, len(samples)] == [name, 2]
    # Coefficients fall from text to text, and each text ends where its own is highest.
    lasts = [values[-1] for values in samples[0].values]
    assert lasts == sorted(lasts, reverse=True)
    assert all(values[-1] == max(values) for values in samples[0].values)
    assert "sentences of the model's grammar" in section.text


def test_components_are_tested_by_taking_them_out(page, causal):
    section = part(page, "components")
    layers = cm.log_prob_contributions(causal, TEXT)
    best = layers.top(1)
    layer = int(best.components.layer[0, 0])
    told = f"in layer {layer} ({float(best.scores[0, 0]):+.2f} nats) adds most"
    assert told in section.finding
    steps = titled(section, "through the layers")
    assert steps.series[0][1] == tuple(layers.trajectory[0].tolist())
    neurons = cm.log_prob_contributions(causal, TEXT, by="ff_neuron", k=10)
    assert tuple(row[0] for row in titled(section, "Top 10").rows) == neurons.labels()
    assert titled(section, "by position").columns == layers.tokens.strings[0]
    heads = cm.log_prob_contributions(causal, TEXT, by="head").top(3)
    out = cm.knockout(causal, TEXT, heads=heads).to_dataframe().set_index("quantity")
    row = titled(section, "Knockout").rows[-1]
    assert row[0] == "the 3 best heads"
    assert row[1:4] == tuple(out.loc["probability", ["before", "after", "control"]])
    assert f"from {row[1]:.0%} to {row[2]:.0%} (random ones: {row[3]:.0%})" in section.finding


def test_comparison_measures_the_methods(page, causal):
    section = part(page, "comparison")
    found = cm.compare(causal, demo_pairs(count=8), methods=["value_zeroing"])
    expected = found.best("dot").iloc[0]
    row = next(
        row
        for row in titled(section, "by alignment with the cue").rows
        if row[0] == "Value Zeroing"
    )
    assert row[1].startswith(f"{expected['value']:.2f} ({expected['low']:.2f} to")
    assert row[2] == expected["layer"]
    assert section.finding.startswith("Best aligned with the cue: Value Zeroing at layer 2")
    rows = shown(section, Heatmap)
    torch.testing.assert_close(rows.values.sum(-1), torch.ones(1, 6), rtol=1e-4, atol=1e-4)
    rolled = cm.value_zeroing(causal, TEXT).normalize().rollout().scores[0, -1, 0, -1]
    torch.testing.assert_close(rows.values[0, rows.rows.index("Value Zeroing")], rolled)


def test_report_of_a_masked_model_is_about_the_mask(masked):
    names: list[SectionName] = ["prediction", "mixing", "memories", "components", "graph"]
    page = cm.report(masked, MASKED, sections=names)
    assert [section.title for section in page.sections] == [QUESTIONS[name] for name in names]
    assert page.sections[0].finding.startswith("At “[MASK]” the model predicts “")
    assert [panel for panel in part(page, "memories").panels if isinstance(panel, Samples)]
    charts = [one for one in Parsed(page.html()).maps() if "causal" in one]
    assert len(charts) == 4
    assert all(chart["causal"] is False for chart in charts)


def test_report_without_a_mask_predicts_nothing(masked):
    names: list[SectionName] = ["prediction", "mixing", "memories", "components", "graph"]
    names.append("comparison")
    page = cm.report(masked, "the keys to the cabinet are old .", sections=names)
    assert [section.title for section in page.sections[:-1]] == [QUESTIONS["mixing"]]
    assert set(left_out(page)) == {"prediction", "memories", "components", "graph", "comparison"}
    assert set(left_out(page).values()) == {"the text has no mask token to predict"}


@pytest.mark.every
@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no encoder-decoder that works")
def test_report_of_an_encoder_decoder_maps_the_encoder():
    model = cm.load_demo("encoder-decoder")
    page = cm.report(model, "the bat burned .")
    told = ["prediction", "answer", "mixing", "feed-forward", "components", "graph"]
    told.append("encoder-layers")
    assert [section.title for section in page.sections[:-1]] == [QUESTIONS[name] for name in told]
    assert set(left_out(page)) == {"memories", "comparison"}
    section = part(page, "encoder-layers")
    table, judged = shown(section, Table), shown(section, Heatmap, 1)
    curves = [shown(section, Curves, place) for place in range(2, len(section.panels))]
    assert [row[0] for row in table.rows] == [0, 1, 2, 3, 4]
    assert table.rows[-1][1] == "la batte brûlait ."
    assert all(0 < float(str(row[2])) <= 1 for row in table.rows)
    assert judged.rows[-1] == "layer 4"
    assert [curve.title for curve in curves] == [
        "Distance from the final output, by layer",
        "How improbable the final output is, by layer",
    ]
    assert curves[0].series[0][1][-1] == 0, "the last layer's output is the final one"
    assert len(page.html().encode()) < 3 * 2**20
    assert dict(page.facts)["Maps of"] == "the encoder"
    parsed = Parsed(page.html())
    assert not any(told.get("causal") for told in parsed.maps())
    decoder = cm.attention_norms(model, "the bat burned .").normalize()
    row = titled(part(page, "mixing"), "by layer")
    torch.testing.assert_close(row.values[0], decoder.scores[0, :, 0, -1])
    assert row.columns == decoder.source.strings[0]
    # Every token of the output is explained.
    words = (" la", " batte", " brûlait", " .", "</s>")
    words_section = part(page, "answer")
    table = shown(words_section, Table)
    assert tuple(row[0] for row in table.rows) == words
    assert shown(words_section, Heatmap, 1).rows == words
    read = cm.log_prob_contributions(model, "the bat burned .", generate=30, by="position").as_map()
    totals = read.scores[0, :, 0].sum(0)
    for row, scores in zip(table.rows, totals, strict=True):
        assert row[4] == read.source.strings[0][int(scores.argmax())]
        assert row[5] == pytest.approx(float(scores.max()), rel=1e-3, abs=1e-6)
    assert words_section.finding.startswith("The model says “la batte brûlait .</s>”.")


@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no encoder-decoder that works")
def test_a_companion_tells_what_the_model_cannot(causal):
    companion = cm.load_demo("encoder-decoder")
    page = cm.report(causal, TEXT, sections=["encoder-layers"], companion=companion)
    section = part(page, "encoder-layers")
    assert section.text.startswith("causal-lm has no encoder; this is the bundled encoder-decoder")
    assert "la batte brûlait ." in section.finding


def test_sections_keep_their_order_and_must_exist(causal):
    page = cm.report(causal, TEXT, sections=["mixing", "prediction"])
    told = [section.title for section in page.sections]
    assert told == [QUESTIONS["prediction"], QUESTIONS["mixing"]]
    with pytest.raises(cm.InvalidInput, match="no such section"):
        cm.report(causal, TEXT, sections=[])
    # Names are checked by the type checker of the tests first, so past it.
    with pytest.raises(cm.InvalidInput, match="no such section: got 'rollout'; expected some of"):
        inspect.unwrap(sections.chosen)(["rollout"])


def test_triggers_and_pairs_of_ones_own_are_taken(causal, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the keys to the cabinet are old .\nthe cabinet is old .\n")
    cm.mine_triggers(causal, str(corpus), out=tmp_path / "mined", k=2)
    pairs = tmp_path / "pairs.jsonl"
    good, bad = "the keys to the cabinet are old .", "the keys to the cabinet is old ."
    line = json.dumps({"sentence_good": good, "sentence_bad": bad})
    pairs.write_text(f"{line}\n{line}\n")
    asked: list[SectionName] = ["memories", "comparison"]
    given = {"triggers": tmp_path / "mined", "pairs": pairs}
    path = write_report(causal, TEXT, tmp_path / "page.html", sections=asked, **given)
    text = Parsed(path.read_text(encoding="utf-8")).text
    assert "These were mined beforehand." in text
    assert "95 % interval over 2 sentences" in text
    # Without cues nothing can point at them; faithfulness can still be measured.
    assert "Best at ranking tokens as blanking them does (blank-out): " in text


def test_a_model_without_a_corpus_or_pairs_says_how_to_get_them(causal, monkeypatch):
    for module in ("memories", "comparison"):
        module = importlib.import_module(f"tl_contextmix.reporting.{module}_section")
        monkeypatch.setattr(module, "DEMO_NAMES", ())
    page = cm.report(causal, TEXT, sections=["memories", "comparison"])
    assert left_out(page) == {}
    assert not [p for p in part(page, "memories").panels if isinstance(p, Samples)]
    assert "tl-contextmix mine" in part(page, "memories").text
    assert "tl-contextmix compare --pairs" in part(page, "comparison").text
    assert len(part(page, "comparison").panels) == 1


def test_both_schemes_and_paper_are_provided_for(page):
    html = page.html()
    # Of the page and of the numbers in its tables.
    assert html.count("screen and (prefers-color-scheme: dark)") == 2
    assert html.count("@media print") == 1
    dark = html[html.index("prefers-color-scheme: dark") :]
    ink, ground = (_colour(dark, name) for name in ("--ink", "--ground"))
    assert colors._contrast(ink, ground) > 7
    assert colors._contrast(_colour(dark, "--soft"), _colour(dark, "--paper")) > 4.5
    assert colors._contrast(_colour(dark, "--accent"), _colour(dark, "--ground")) > 4.5


def _colour(css: str, name: str) -> tuple[int, int, int]:
    found = re.search(rf"{name}: #([0-9a-f]{{6}})", css)
    assert found, name
    return tuple(bytes.fromhex(found[1]))  # type: ignore[return-value]


def test_report_is_small_offline_and_always_the_same(page, causal):
    first = page.html()
    names: list[SectionName] = ["mixing", "memories"]
    some, again = (cm.report(causal, TEXT, sections=names).html() for _ in range(2))
    assert some == again
    assert len(first.encode()) < 3_000_000
    parsed = Parsed(first)
    places = [a.get("src") or a.get("href") or "#" for _, a in parsed.tags]
    assert all(place.startswith(("#", "data:")) for place in places)
    assert len(parsed.programs()) == 2


def test_a_headline_names_only_what_stands_out(causal):
    assert drawing.stands_out([0.1, 0.9, 0.12, 0.11]) == 1
    assert drawing.stands_out([0.1, 0.12, 0.12, 0.11]) is None
    assert drawing.stands_out([0.5, 0.6]) is None
    assert drawing.stands_out([0.5, 0.9, float("nan")]) == 1
    assert drawing.stands_out([]) is None
    page = cm.report(causal, "the", sections=["mixing"])
    assert "stands out" in page.sections[0].finding or "comes from" in page.sections[0].finding
    told = read(causal, TEXT)
    flat = {
        point: replace(map, scores=torch.ones_like(map.scores).tril())
        for point, map in told.maps.items()
    }
    finding = mixing_section.mixing(replace(told, maps=flat)).finding
    assert finding.startswith("No single source stands out for “cabinet”: the largest share is 17%")


def test_an_answer_of_several_tokens_is_explained_if_asked_for(causal):
    page = cm.report(causal, TEXT, sections=["answer", "prediction"], generate=3)
    assert [section.title for section in page.sections] == [
        QUESTIONS["prediction"],
        QUESTIONS["answer"],
    ]
    assert len(shown(part(page, "answer"), Table).rows) == 3


def test_what_is_odd_about_a_text_is_said_on_the_page(masked):
    with pytest.warns(ContextMixWarning, match="was not trained on"):
        page = cm.report(masked, "the ☃ sneezed [MASK] .", sections=["prediction"])
    told = Parsed(page.html()).text
    assert "masked-lm was never trained on '☃', 'sneezed': what this page says of them" in told
    assert "A nat is the unit of a natural logarithm" in told
    assert "does not know what stands at position 2 of the text" in told


def test_findings_survive_text_that_is_markup(masked):
    text = "<img src=x onerror=alert(1)> [MASK] </script>"
    with pytest.warns(ContextMixWarning, match="was not trained on"):
        page = cm.report(masked, text, sections=["prediction", "mixing", "components"])
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
    with pytest.raises(cm.InvalidInput, match="one sentence"):
        read(causal, [TEXT, TEXT])


def test_points_a_model_lacks_are_left_out_with_the_reason(causal, monkeypatch):
    def without_feed_forward(model: Any, text: str, **options: Any) -> Any:
        at = options["at"]
        if set([at] if isinstance(at, str) else at) - {"attn_out", "resid_mid"}:
            raise cm.UnsupportedModel("these neurons cannot be read")
        return cm.attention_norms(model, text, **options)

    monkeypatch.setattr(story, "attention_norms", without_feed_forward)
    names: list[SectionName] = ["mixing", "points", "feed-forward", "memories"]
    page = cm.report(causal, TEXT, sections=names)
    assert "these neurons cannot be read" in part(page, "points").text
    told = [panel.title for panel in part(page, "mixing").panels]
    assert "Each layer's stream after attention by source" in told
    assert not any("Value Zeroing" in title for title in told)
    assert left_out(page) == dict.fromkeys(names[2:], "these neurons cannot be read")
    assert page.html()


def test_a_model_without_any_map_is_refused(causal, monkeypatch):
    def refuse(*args: Any, **options: Any) -> Any:
        raise cm.UnsupportedModel("nothing can be read")

    monkeypatch.setattr(story, "attention_norms", refuse)
    with pytest.raises(cm.UnsupportedModel, match="nothing can be read"):
        cm.report(causal, TEXT)


def test_a_model_without_readout_predicts_nothing(causal):
    told = read(causal, TEXT)
    view = told.forward_pass.view
    silent = replace(view, readout=replace(view.readout, refusal="no trained head"))
    told = replace(told, forward_pass=replace(told.forward_pass, view=silent))
    for name in ("prediction", "memories", "components", "graph", "comparison"):
        assert sections.SECTIONS[name](told) == "no trained head"


# ---- files


def test_write_report_takes_a_name_or_a_model(causal, tmp_path):
    some: list[SectionName] = ["prediction"]
    first = write_report("causal-lm", path=tmp_path / "first.html", sections=some)
    title = "Context-mixing report"
    second = write_report(causal, TEXT, tmp_path / "second.html", title=title, sections=some)
    assert first == tmp_path / "first.html"
    assert first.read_bytes() == second.read_bytes()


def test_report_shows_any_results(causal, tmp_path):
    maps = cm.attention_norms(causal, TEXT, at=POINTS)
    results = [
        maps["block_out"],
        cm.contextualization_change(maps),
        cm.amplified_pairs(maps["mlp_in"], maps["mlp_out"], k=2),
        cm.mixing_ratio(causal, TEXT),
        cm.check(causal),
    ]
    path = write_results(results, tmp_path / "results.html", title="Mine")
    parsed = Parsed(path.read_text(encoding="utf-8"))
    view = as_view(causal)
    for part in ("Mine", "attention_norms(at='block_out'", f"{view.host} {view.host_version}"):
        assert part in parsed.text
    assert "IdentityReport" in parsed.text
    assert len(parsed.maps()) == 1
    alone = write_results(maps["block_out"], tmp_path / "alone.html")
    assert len(Parsed(alone.read_text(encoding="utf-8")).maps()) == 1


def test_report_of_no_result_is_refused(tmp_path):
    with pytest.raises(cm.InvalidInput, match="a str; expected results"):
        write_results(["text"], tmp_path / "page.html")


def test_report_of_results_names_what_writes_them(causal):
    for results in ([1], cm.check(causal)):
        with pytest.raises(cm.InvalidInput, match=r"tl_contextmix\.reporting\.write_results"):
            cm.report(results)


def test_results_show_themselves(causal):
    shown = cm.attention_norms(causal, TEXT).show()
    assert isinstance(shown, Page)
    assert shown.title == "Context map"
    assert len(Parsed(shown.html()).maps()) == 1


# ---- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> tuple[int, list[str], list[str]]:
        code = command_line.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.mark.every
def test_command_report_writes_a_page_and_prints_its_path(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", "--sections", "mixing,encoder-layers")
    assert (code, out, err) == (0, ["tl_contextmix_report.html"], [])
    text = (tmp_path / "tl_contextmix_report.html").read_text(encoding="utf-8")
    assert "“keys”" in text
    # On TransformerLens 2 nothing reads the embedded encoder-decoder right.
    assert ("la batte brûlait ." in text) == (zoo.major() != 2)


def test_command_report_options(run, tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(shared_options.webbrowser, "open", opened.append)
    path = tmp_path / "page.html"
    text = "the author that the senators admire"
    options = ("--sections", "mixing", "-o", path, "--open")
    code, out, err = run("report", "masked-lm", text, *options)
    assert (code, out, err) == (0, [str(path)], [])
    assert opened == [path.as_uri()]
    parsed = Parsed(path.read_text(encoding="utf-8"))
    assert text in parsed.text
    assert "masked-lm" in parsed.text


@pytest.mark.every
def test_command_check_prints_the_identities(run, causal):
    code, out, err = run("check", "causal-lm")
    assert (code, err) == (0, [])
    assert out == str(cm.check(causal)).splitlines()


@pytest.mark.every
def test_command_check_fails_where_an_identity_does(run, causal, monkeypatch):
    found = cm.check(causal)
    broken = replace(found, rows=(replace(found.rows[0], error=1.0), *found.rows[1:]))
    monkeypatch.setattr(on_texts, "check_model", lambda model: broken)
    code, out, _ = run("check", "causal-lm")
    assert code == 1
    assert "FAIL" in "".join(out)


def test_a_command_line_of_no_words_is_answered_by_the_help(capsys):
    assert command_line.main([]) == 2
    assert "Usage: tl-contextmix" in capsys.readouterr().err


def test_command_runs_as_a_module():
    assert unchecked.run("-m", "tl_contextmix", "--version").startswith("tl-contextmix ")
