"""Maps of an answer: a row for each token of it, prompt and earlier output apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.core.words import find_text
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap

pytestmark = pytest.mark.mostly_once

MAPS: dict[str, Any] = {
    "attention": lambda *given, **asked: cm.attention(*given, heads=False, **asked),
    "attention_flow": cm.attention_flow,
    "attention_norms": cm.attention_norms,
    "globenc": cm.globenc,
    "alti": cm.alti,
    "decompx": lambda *given, **asked: cm.decompx(*given, of="norm", **asked),
    "value_zeroing": cm.value_zeroing,
}
PROMPTS, ANSWERS = ([5, 9, 17, 4], [5, 8]), ([11, 6], [13, 7, 12])
WRITERS = [case for case in zoo.kinds() if case.family in ("gpt2", "llama", "t5", "bart")]
TEXT = "the keys to the cabinet are red . the dog near the"


def padded(rows: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def started(case: zoo.Case) -> dict[str, Any]:
    return {"decoder_input": torch.tensor([[2], [2]])} if case.encoder_decoder else {}


@pytest.mark.every
@pytest.mark.parametrize("case", [c for c in zoo.cases() if c.encoder_decoder], ids=str)
def test_what_an_encoder_decoder_says_is_its_own_best(case: zoo.Case) -> None:
    """Also where the decoder is the deeper stack, of which Hugging Face makes too small a cache."""
    model, given = shared(case)
    start = keywords(given)["decoder_input"][:1, :2]
    for first in (start, start[:, 1:]):  # or a prompt that does not begin with the start token
        said = cm.attention(model, given.tokens[:1], decoder_input=first, generate=3).target.ids[0]
        whole = torch.cat([first, said[None]], dim=1)
        logits = zoo.logits(model, zoo.Inputs(given.tokens[:1], whole))[0, first.shape[1] - 1 :]
        assert logits[: len(said)].argmax(dim=-1).tolist() == said.tolist()


@pytest.mark.every
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("case", WRITERS, ids=str)
def test_rows_of_an_answer_are_those_of_the_whole_text(case: zoo.Case, name: str) -> None:
    if name == "attention_flow" and case.family != "gpt2":
        pytest.skip("the same for all; it is slow")
    model, make = zoo.shared(case), MAPS[name]
    ids, mask = padded(PROMPTS)
    start = started(case)
    found = make(model, ids, attention_mask=mask, target=[*ANSWERS], **start)
    assert found.target.ids.tolist() == [[11, 6, 6], [13, 7, 12]]
    assert found.target.mask.tolist() == [[True, True, False], [True] * 3]
    assert found.target.strings[0][2] == ""
    sides = dict(found.source.sides)
    assert sides["output"] == 3
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        if case.encoder_decoder:
            given = {"decoder_input": torch.tensor([[2, *answer]])}
            alone, before = make(model, torch.tensor([prompt]), **given), 1
        else:
            alone, before = make(model, torch.tensor([[*prompt, *answer]])), len(prompt)
        rows = [before - 1 + step for step in range(len(answer))]
        mine = found.select(batch=row, target=[*range(len(answer))])
        for side in sides:
            expected = alone.scores[:, :, :, rows]
            if side == "encoder":
                expected = expected[..., alone.source.side("encoder")]
            elif side == "output":
                expected = expected[..., before : before + len(answer)]
            else:
                expected = expected[..., :before]
            part = mine.select(source=side)
            real = part.source.mask[0].nonzero()[:, 0].tolist()
            assert expected.shape[4] == len(real)
            assert relative(part.scores[..., real], expected) <= 1e-9
        if alone.bias is not None:
            assert relative(mine.bias, alone.bias[:, :, :, rows]) <= 1e-9
    blank = ~found.source.mask
    assert not bool(found.scores.permute(0, 4, 1, 2, 3)[blank].any())
    assert not bool(found.scores[0, :, :, 2].any())


@pytest.mark.every
@pytest.mark.parametrize("case", zoo.spread(), ids=str)
def test_decompx_adds_up_to_the_difference_of_logits(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    asked: dict[str, Any] = {"target": 9, "foil": 7, "pos": -2, **keywords(given)}
    sublayers = [block.feed_forward for block in view.blocks()]
    if view.readout.refusal or any(ff is not None and ff.refusal for ff in sublayers):
        return  # what is refused there is tested elsewhere
    if view.readout.head is not None or view.readout.soft_cap is not None:
        with pytest.raises(cm.UnsupportedModel, match="no logit is a sum"):
            cm.decompx(model, given.tokens, **asked)
        return
    with torch.no_grad():
        logits = zoo.logits(model, given)[:, -2]
    questions: list[tuple[dict[str, Any], Tensor]] = [
        ({}, logits[:, 9] - logits[:, 7]),
        ({"foil": None}, logits[:, 9]),
        ({"target": {9, 5}}, _mean(logits, [5, 9]) - logits[:, 7]),
    ]
    for options, expected in questions:
        found = cm.decompx(model, given.tokens, **{**asked, **options})
        total = found.scores.sum(-1)[:, 0, 0, 0] + found.bias[:, 0, 0, 0]
        assert relative(total, expected) <= bound(case)
    # The vectors after the last layer, read by hand.
    found = cm.decompx(model, given.tokens, **asked)
    vectors = decompx_vectors(model, given.tokens, layer=-1, **keywords(given))
    parts, bias = vectors.parts[:, 0, -2], vectors.bias[:, 0, -2]
    whole, norm = parts.sum(dim=1) + bias, view.readout.norm
    W_U, b_U = view.readout.weights("W_U"), view.readout.weights("b_U")
    column = (W_U[:, 9] - W_U[:, 7]) * view.readout.scale
    read = _frozen(norm, parts, whole[:, None]) @ column
    assert relative(found.scores[:, 0, 0, 0], read) <= bound(case)
    constant = _frozen(norm, bias, whole) @ column
    constant = constant + (0 if norm is None or norm.bias is None else norm.bias @ column)
    constant = constant + (0 if b_U is None else b_U[9] - b_U[7])
    assert float((found.bias[:, 0, 0, 0] - constant).abs().max()) <= bound(case) * (
        1 + float(read.abs().max())
    )


def _mean(logits: Tensor, ids: list[int]) -> Tensor:
    some = logits[:, ids]
    return (some * some.softmax(dim=1)).sum(dim=1)


def _frozen(norm: Norm | None, part: Tensor, whole: Tensor) -> Tensor:
    return part if norm is None else norm.linear(part) / norm.scale(whole)


@pytest.mark.every
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_contributions_by_position_are_a_map(family: str) -> None:
    case = case_of(family)
    model = zoo.shared(case)
    ids, mask = padded(PROMPTS)
    start = started(case)
    asked: dict[str, Any] = {"target": [*ANSWERS], "attention_mask": mask, **start}
    for by in ("position", "head_position"):
        found = cm.log_prob_contributions(model, ids, by=by, **asked)
        frame, layered = found.to_dataframe(), found.as_map(layers=True)
        assert layered.target.mask.tolist() == [[True, True, False], [True] * 3]
        assert relative(layered.scores.sum((1, 2)), found.as_map().scores.sum((1, 2))) <= 1e-12
        seen = 0
        for line in frame[frame.source >= 0].itertuples():
            sentence = int(found.sentence[line.batch])
            turn = int((found.sentence[: line.batch] == sentence).sum())
            encoder = line.kind == "cross_attn"
            columns = [
                place
                for place, (side, pos) in enumerate(
                    zip(layered.source.names(), layered.source.positions()[sentence], strict=True)
                )
                if (side == "encoder") == encoder
                and int(pos) == line.source
                and bool(layered.source.mask[sentence, place])
            ]
            assert len(columns) == 1
            head = max(0, line.head)
            score = layered.scores[sentence, line.layer, head, turn, columns[0]]
            if not (encoder and by == "position"):
                assert float(score) == pytest.approx(line.score, abs=1e-12)
            seen += 1
        assert seen > 20
        assert layered.source.sides[:2] == (
            ("decoder", 1) if case.encoder_decoder else ("prompt", 4),
            ("output", 3),
        )
    with pytest.raises(cm.InvalidInput, match="no map of source tokens"):
        cm.log_prob_contributions(model, ids, **asked).as_map()
    with pytest.raises(cm.InvalidInput, match="no map of source tokens"):
        found.top(3).as_map()


def test_a_foil_makes_a_map_that_adds_up() -> None:
    model = cm.load_demo("causal-lm")
    found = cm.log_prob_contributions(model, TEXT, by="position", target=" are", foil=" is")
    map = found.as_map()
    layers = cm.log_prob_contributions(model, TEXT, target=" are", foil=" is")
    attention = layers.scores[layers.components.of_kind("attn")].sum()
    assert float(map.scores.sum() + map.bias.sum()) == pytest.approx(float(attention), abs=1e-4)
    assert map.source.sides == (("decoder", 13),)
    assert map.layer_names == ("prediction",)
    with pytest.raises(cm.InvalidInput, match="add up as they are"):
        map.normalize()


def test_spans_add_up_what_they_cover() -> None:
    model = cm.load_demo("causal-lm")
    said = cm.value_zeroing(model, TEXT, generate=4)
    assert said.source.sides == (("prompt", 13), ("output", 4))
    assert said.target.strings == ((" shelf", " are", " old", " ."),)
    sentences = said.by_span("sentences")
    assert sentences.source.strings == (
        (
            "<|endoftext|>",
            " the keys to the cabinet are red .",
            " the dog near the",
            " shelf are old .",
        ),
    )
    spans = [(0, 1), (1, 9), (9, 13), (13, 17)]
    for place, (start, stop) in enumerate(spans):
        expected = said.scores[..., start:stop].sum(-1)
        assert relative(sentences.scores[..., place], expected) <= 1e-6
    sides = said.by_span("sides")
    assert sides.source.sides == (("prompt", 1), ("output", 1))
    passage = said.by_span(["The keys to the cabinet", (9, 11)])
    assert [word.strip() for word in passage.source.strings[0]] == [
        "<|endoftext|>",
        "the keys to the cabinet",
        "are red .",
        "the dog",
        "near the",
        "shelf are old .",
    ]
    for some in (sentences, sides, passage, said.by_span("words")):
        assert relative(some.scores.sum(-1), said.scores.sum(-1)) <= 1e-6
        assert some.target.equals(said.target)
    for spans, message in (
        (["the cat"], "no such text among the tokens"),
        ([(0, 3), (2, 4)], "spans overlap"),
        ([(11, 15)], "stretches of tokens of one stack"),
        ([(3, 99)], "covers no token"),
        ("paragraphs", "one of"),
    ):
        with pytest.raises(cm.InvalidInput, match=message):
            said.by_span(spans)  # type: ignore[arg-type]


def test_texts_are_found_as_they_are_written_or_as_they_read() -> None:
    pieces = [
        "<s>",
        " the",
        " caf",
        "⟨C3⟩",
        "⟨A9⟩",
        " ",
        "⟨F0⟩",
        "⟨9F⟩",
        "⟨99⟩",
        "⟨82⟩",
        " The",
        "is",
    ]
    for text, expected in (
        (" the", [(1, 2)]),  # as it is written
        ("the", [(1, 2), (10, 11)]),  # nothing is: whatever its case and spaces
        ("CAFÉ", [(2, 5)]),
        ("\U0001f642", [(6, 10)]),
        ("the café \U0001f642", [(1, 10)]),
        ("caf", [(2, 3)]),
        ("ca", []),  # whole tokens
        (" ", [(5, 6)]),
        ("", []),
    ):
        assert find_text(pieces, [True] * len(pieces), text, True) == expected, text
    words = ["", "the", "key", "##s", "the"]
    assert find_text(words, [False, True, True, True, True], "Keys the", False) == [(2, 5)]


def test_sentences_end_where_they_end() -> None:
    for kind, text, expected in (
        (
            "causal-lm",
            "the dog sees it . the cat runs ! the old man",
            ["the dog sees it .", "the cat runs !", "the old man"],
        ),
        (
            "masked-lm",
            "the dog runs . the [MASK] is red .",
            ["the dog runs .", "[MASK]", "is red ."],
        ),
    ):
        model = cm.load_demo(kind)
        tokens = cm.attention(model, text, heads=False).by_span("sentences").source
        found = [word.strip() for word in tokens.strings[0]]
        assert [one for one in expected if one not in found] == [], found


@pytest.mark.newest
def test_settings_of_the_model_are_followed_or_refused_when_it_generates() -> None:
    model = cm.load_demo("causal-lm")
    settings = model.original_model.generation_config

    def said(**changed: Any) -> list[str]:
        settings.update(**changed)
        found = cm.attention(model, "the capital of france", generate=4)
        settings.update(**dict.fromkeys(changed))
        return [word.strip() for word in found.source.strings[0][5:]]

    assert said() == ["is", "paris", ".", "<|endoftext|>"]
    assert said(stop_strings=["paris"]) == ["is", "paris"]
    assert said(do_sample=True, num_return_sequences=3) == said()
    # Longer than what is generated, which ends no sooner; nothing warns of it.
    assert said(min_length=50)[:3] == said(min_new_tokens=50)[:3] == said()[:3]
    assert "<|endoftext|>" not in said(min_length=50) + said(min_new_tokens=50)
    with pytest.raises(cm.UnsupportedModel, match="by its own settings.*or pass the answer"):
        said(dola_layers="high")
    model = cm.load_demo("encoder-decoder")
    settings = model.original_model.generation_config
    asked: dict[str, Any] = {"decoder_input": torch.tensor([[0, 5]]), "generate": 3}
    before = cm.attention(model, "the capital of france", **asked).target.ids
    settings.update(cache_implementation="dynamic")
    assert torch.equal(cm.attention(model, "the capital of france", **asked).target.ids, before)


def test_a_rollout_is_taken_to_what_was_said() -> None:
    model = cm.load_demo("causal-lm")
    said = cm.alti(model, TEXT, generate=4)
    whole = cm.alti(model, said.source.ids).normalize().rollout()
    rolled = whole.at(said.target, said.source)
    assert rolled.target.equals(said.target)
    assert torch.equal(rolled.scores[0, :, 0], whole.scores[0, :, 0, 12:16])
    with pytest.raises(cm.InvalidInput, match="cannot be rolled out"):
        said.rollout()
    with pytest.raises(cm.InvalidInput, match="lacks some of these positions"):
        said.at(whole.target, whole.source)
    with pytest.raises(cm.InvalidInput, match="sentences"):
        cm.alti(model, [TEXT, TEXT]).at(said.target, said.source)


def test_what_cannot_be_asked_of_a_map() -> None:
    model = cm.load_demo("causal-lm")
    with pytest.raises(cm.InvalidInput, match="the same whatever the foil"):
        cm.attention_norms(model, TEXT, target=" are", foil=" is")
    with pytest.raises(cm.InvalidInput, match="read after the last layer"):
        cm.decompx(model, TEXT, target=" are", layer=1)
    with pytest.raises(cm.InvalidInput, match="no such position"):
        cm.alti(model, TEXT, pos=99)
    words = model.cfg.d_vocab
    for target in (words, 10**30, {5, words}, [[5, words]]):
        with pytest.raises(cm.InvalidInput, match=rf"no target: .*ids from 0 to {words - 1}"):
            cm.attention(model, TEXT, target=target)
    translator = cm.load_demo("encoder-decoder")
    with pytest.raises(cm.InvalidInput, match="this stack predicts no tokens"):
        cm.attention(translator, "the dog", stack="encoder", generate=2)
    some = cm.attention(translator, "the dog", stack="encoder", pos=[0, -1])
    whole = cm.attention(translator, "the dog", stack="encoder")
    assert torch.equal(some.scores, whole.scores[:, :, :, [0, -1]])
    masked = cm.load_demo("masked-lm")
    filled = cm.value_zeroing(masked, "the keys [MASK] red .", target=" are")
    assert [word.strip() for word in filled.target.strings[0]] == ["are"]
    with pytest.raises(cm.UnsupportedModel, match="its head is not linear"):
        cm.decompx(masked, "the keys [MASK] red .", target=" are")


def test_an_answer_takes_one_pass_and_its_rows_alone() -> None:
    model = cm.load_demo("causal-lm")
    said = cm.value_zeroing(model, TEXT, generate=4)
    asked: dict[str, Any] = {"target": " shelf are old ."}
    passes: list[int] = []
    handle = model.unembed.register_forward_hook(lambda *_: passes.append(1))
    for make in MAPS.values():
        passes.clear()
        make(model, TEXT, **asked)
        assert len(passes) == 1
    handle.remove()
    rows = count_operations(lambda: cm.value_zeroing(model, TEXT, **asked))
    every = count_operations(lambda: cm.value_zeroing(model, said.source.ids))
    forward = count_operations(lambda: cm.attention(model, said.source.ids))
    assert rows - forward < 0.5 * (every - forward)


def test_a_generated_map_is_kept_shown_and_written(tmp_path: Path, capsys: Any) -> None:
    translator = cm.load_demo("encoder-decoder")
    text = "the keys to the cabinet are red ."
    said = cm.decompx(translator, text, generate=20)
    said.save(tmp_path / "said.safetensors")
    again = ContextMap.load(tmp_path / "said.safetensors")
    assert said.equals(again)
    assert said.provenance.options["of"] == "logit"
    (panel,) = said.panels()
    assert isinstance(panel, Heatmap)
    assert panel.sides == (
        ("decoder", 1),
        ("output", 6),
        ("encoder", len(said.source.side("encoder"))),
    )
    assert panel.hidden[:, 1:7].tolist() == torch.ones(6, 6).triu().bool().tolist()
    assert not bool(panel.hidden[:, 7:].any())
    page = said._repr_html_()
    assert "later token, cannot be read" in page
    best = {row["target_token"]: row["source_token"] for row in reversed(said.top(30))}
    assert (best[" clés"], best[" rouges"]) == (" keys", " red")
    assert main(["value-zeroing", "causal-lm", TEXT, "--generate", "3"]) == 0
    assert "target 3" in capsys.readouterr().out
    assert main(["alti", "causal-lm", TEXT, "--target", " are", "--foil", " is"]) == 2
    assert "the same whatever the foil" in capsys.readouterr().err
