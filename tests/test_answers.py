"""What is asked: a foil, alternatives, several positions, answers of several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.engine.log_prob_scores import run_question
from tl_contextmix.evaluation import blanked, demo_pairs
from tl_contextmix.plotting.panels import Table
from tl_contextmix.results import LogProbContributions

TEXT = "the keys to the cabinet"
ONES: dict[str, Any] = {"target": 9, "foil": 7}
SETS: dict[str, Any] = {"target": {9, 5}, "foil": {7, 8, 11}}
SPLITS: tuple[Any, ...] = ("layer", "head", "position", "head_position", "ff_neuron", "attn_neuron")


def log_odds(logits: Tensor, target: Sequence[int], foil: Sequence[int]) -> Tensor:
    """The log of the odds of one set of tokens and another."""
    return logits[..., list(target)].logsumexp(-1) - logits[..., list(foil)].logsumexp(-1)


def contributions(model: Any, given: zoo.Inputs, **options: Any) -> LogProbContributions:
    """Contributions to a prediction in the middle."""
    options = {"pos": -2, **keywords(given), **options}
    return cm.log_prob_contributions(model, given.tokens, **options)


@pytest.mark.parametrize("case", zoo.cases(), ids=str)
def test_a_foil_makes_parts_add_up_at_every_granularity(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    with torch.no_grad():
        logits = zoo.logits(model, given)[:, -2]
    odds = log_odds(logits, [9], [7])
    for by in SPLITS:
        if by == "ff_neuron" and view.blocks()[0].feed_forward is None:
            continue
        found = contributions(model, given, by=by, **ONES)
        assert relative(found.log_prob, odds) <= bound(case)
        assert relative(found.trajectory[:, -1], odds) <= bound(case)
        if by == "layer":
            total = found.scores.nansum(dim=1) + found.trajectory[:, 0]
            assert relative(total, odds) <= bound(case)
        elif view.readout.head is None and view.readout.soft_cap is None:
            # Nothing is left over: the sublayers that are split are the sum of their parts.
            assert float(found.gaps.nan_to_num().abs().max()) <= bound(case) * float(
                1 + found.scores.nan_to_num().abs().max()
            )
            assert bool((~found.gaps.isnan()).any())
        else:
            assert float(found.gaps.nan_to_num().abs().max()) > 1e-6


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_alternatives_are_a_difference_of_log_sum_exps(case: zoo.Case) -> None:
    model, given = shared(case)
    heads = contributions(model, given, by="head", **SETS)
    layers = contributions(model, given, **SETS)
    with torch.no_grad():
        odds = log_odds(zoo.logits(model, given)[:, -2], [5, 9], [7, 8, 11])
    total = layers.scores.nansum(dim=1) + layers.trajectory[:, 0]
    assert relative(total, odds) <= bound(case)
    # One attention sublayer, head by head, literally.
    view = view_of(model)
    asked = Given(given.tokens, decoder_input=given.decoder_tokens)
    run = run_question(view, asked, Answer(**SETS, pos=-2))
    prediction = run.prediction("frozen+beta", 2**30)
    step = next(i for i, w in enumerate(prediction.stream.components) if w.kind == "attn")
    component: Any = prediction.stream.components[step]
    for row in range(len(prediction.log_prob)):
        before = prediction.stream.states[row, step]
        after = before + component.heads()[row]
        logits = prediction.vocabulary.log_probs(torch.cat([before[None], after]), row)
        expected = log_odds(logits, [5, 9], [7, 8, 11])
        mine = heads.components.of_kind("attn")[row] & (heads.components.layer[row] == 0)
        assert relative(heads.scores[row, mine], expected[1:] - expected[0]) <= 1e-8


@pytest.mark.parametrize("by", SPLITS)
@pytest.mark.parametrize("asked", [ONES, SETS, {"target": {9, 5}}], ids=["ones", "sets", "target"])
def test_the_best_are_those_of_all(by: Any, asked: dict[str, Any]) -> None:
    model, given = shared(case_of("gpt2"))
    few = contributions(model, given, by=by, k=4, **asked)
    every = contributions(model, given, by=by, **asked).top(4)
    assert torch.equal(few.components.numbers(), every.components.numbers())
    assert relative(few.scores, every.scores) <= 1e-10
    assert relative(few.logits, every.logits) <= 1e-10
    if by.endswith(("neuron", "head_position")):
        assert bool((few.evaluated < few.possible).all())
    assert few.asked() == every.asked()
    assert relative(few.trajectory, every.trajectory) <= 1e-10


@pytest.mark.once
def test_a_foil_is_a_bound_of_its_own() -> None:
    model = cm.load_demo("causal-lm")
    found = cm.log_prob_contributions(model, TEXT, target=" are", foil=" is", by="ff_neuron", k=10)
    assert found.evaluated.tolist() == [16]  # one block: the order of the bounds is that of scores
    assert found.possible.tolist() == [2048]
    assert "16 of 2,048 evaluated exactly" in str(found.panels())
    assert found.asked() == "' are' rather than ' is'"


@pytest.mark.parametrize("family", ["gpt2", "bart", "llama"])
def test_an_answer_has_the_probability_that_hugging_face_gives_it(family: str) -> None:
    model, hf = zoo.shared(case_of(family)), zoo.hf_model(family)
    prompts = [[5, 9, 17], [5, 8]]
    answers = [[11, 6], [13, 7, 12]]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ids = torch.tensor([[5, 9, 17], [5, 8, 0]])
    if family == "bart":
        start = torch.tensor([[2], [2]])
        found = cm.log_prob_contributions(
            model, ids, attention_mask=mask, decoder_input=start, target=answers
        )
    else:
        found = cm.log_prob_contributions(model, ids, attention_mask=mask, target=answers)
    assert found.sentence.tolist() == [0, 0, 1, 1, 1]
    assert found.target.ids[:, 0].tolist() == [11, 6, 13, 7, 12]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            if family == "bart":
                whole = torch.tensor([[2, *answer]])
                logits = hf(torch.tensor([prompt]), decoder_input_ids=whole).logits[0]
                first = 0
            else:
                logits, first = hf(torch.tensor([[*prompt, *answer]])).logits[0], len(prompt) - 1
        steps = logits[first : first + len(answer)].log_softmax(-1)
        expected += steps.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    # Hugging Face's Llama computes norms and rotary angles in float32.
    limit = 1e-5 if family == "llama" else 1e-10
    assert relative(found.log_prob, torch.tensor(expected, dtype=torch.float64)) <= limit
    whole = found.summed()
    assert whole.log_prob.tolist() == pytest.approx(
        [sum(expected[:2]), sum(expected[2:])], rel=limit
    )
    assert relative(whole.scores.nansum(1) + whole.trajectory[:, 0], whole.log_prob) <= 1e-8
    assert whole.asked(0) == repr("".join(found.target.strings[row][0] for row in (0, 1)))


def test_masks_are_an_answer_of_several_tokens() -> None:
    model, hf = zoo.shared(case_of("bert")), zoo.hf_model("bert")
    ids = torch.tensor([[2, 9, 4, 4, 3]])
    found = cm.log_prob_contributions(model, ids, target=[[11, 7]])
    assert found.pos.tolist() == [2, 3]
    with torch.no_grad():
        expected = hf(ids).logits[0, [2, 3]].log_softmax(-1).gather(1, torch.tensor([[11], [7]]))
    assert relative(found.log_prob, expected[:, 0]) <= 1e-10
    with pytest.raises(cm.InvalidInput, match="does not fit the masks: got 3 tokens for 2 masks"):
        cm.log_prob_contributions(model, ids, target=[[11, 7, 8]])


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_every_position_at_once_is_each_alone(case: zoo.Case) -> None:
    model, given = shared(case)
    asked: dict[str, Any] = {**keywords(given), "by": "head", "target": 9, "foil": {7, 8}}
    every = cm.log_prob_contributions(model, given.tokens, pos="all", **asked)
    small = cm.log_prob_contributions(model, given.tokens, pos="all", max_bytes=1, **asked)
    assert every.pos.tolist() == small.pos.tolist()
    assert relative(small.scores, every.scores) <= bound(case)
    length = every.tokens.shape[1]
    assert every.sentence.tolist() == [0] * length + [1] * length
    for pos in (1, length - 1):
        one = cm.log_prob_contributions(model, given.tokens, pos=pos, **asked)
        rows = [pos, length + pos]
        assert every.pos[rows].tolist() == one.pos.tolist()
        assert relative(every.scores[rows], one.scores) <= bound(case)
        assert relative(every.log_prob[rows], one.log_prob) <= bound(case)
    two = cm.log_prob_contributions(model, given.tokens, pos=[1, -1], k=None, **asked)
    assert two.sentence.tolist() == [0, 0, 1, 1]
    assert relative(two.scores[1], every.scores[length - 1]) <= bound(case)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_what_follows_from_an_answer_of_several_tokens(family: str) -> None:
    model, given = shared(case_of(family))
    prompt = given.tokens[:1]
    start: dict[str, Any] = (
        {} if given.decoder_tokens is None else {"decoder_input": given.decoder_tokens[:1, :1]}
    )
    asked: dict[str, Any] = {"target": [[11, 6]], "foil": [[7, 7]], **start}
    neurons = cm.log_prob_contributions(model, prompt, by="ff_neuron", k=2, **asked)
    assert neurons.scores.shape == (2, 2)
    fallen = cm.knockout(model, prompt, neurons=neurons, controls=1, **start)
    before = neurons.log_prob
    assert relative(fallen.before[:, 0], before) <= 1e-9
    # Each neuron that is taken out, by hand, at the position that predicts the second token.
    view = view_of(model)
    whole = neurons.tokens.ids[1:2]
    kind = "main" if given.decoder_tokens is None else "decoder"
    inputs: dict[str, Any] = (
        {"input": prompt, "decoder_input": whole} if kind == "decoder" else {"input": whole}
    )
    batch = make_batch(view, Given(**inputs))
    edits = {}
    for layer in range(len(view.blocks())):
        chosen = neurons.components.neuron[1][neurons.components.layer[1] == layer].tolist()
        ff = view.blocks()[layer].feed_forward
        if chosen:

            def edit(tensor: Tensor, chosen: list[int] = chosen) -> Tensor:
                tensor = tensor.clone()
                tensor[:, int(neurons.pos[1]), chosen] = 0
                return tensor

            edits[ff.post] = edit
    logits = view.run(batch, [], edits=edits).logits
    expected = log_odds(logits[0, int(neurons.pos[1])].double(), [6], [7])
    if family == "gpt2":  # a bias of W_out's input is part of BART's neurons, too: none here
        assert float(fallen.after[1, 0]) == pytest.approx(float(expected), abs=1e-9)
    inner = cm.query_contributions(model, prompt, neurons=neurons, **start)
    assert inner.sentence.tolist() == [0, 0]
    total = inner.scores.nansum(dim=1)
    share = (inner.constant / inner.activation * inner.weights).nansum(dim=1)
    assert total.shape == share.shape == (2,)
    speaking = cm.component_readouts(model, prompt, components=neurons, **start)
    assert speaking.scores.shape == (2, 2)


@pytest.mark.once
def test_a_foil_has_as_many_tokens_as_its_target() -> None:
    model = cm.load_demo("causal-lm")
    asks: list[Any] = [
        cm.log_prob_contributions,
        cm.gradient_x_input,
        cm.decompx,
        partial(cm.alti, of="logit"),
        partial(cm.knockout, heads=[(0, 0)]),
        cm.attention_knockout,
        cm.flow,
    ]
    wrong = ({"target": " are red"}, {"generate": 2}, {"target": [[3, 4]]})
    for ask in asks:
        for asked in wrong:
            with pytest.raises(cm.InvalidInput, match="a target of 2 and a foil of 1 in text 0"):
                ask(model, TEXT, foil=" is", **asked)
    both = cm.log_prob_contributions(model, TEXT, target=" are red", foil=" is old")
    logits = model(model.to_tokens(f"{TEXT} are red"))[0].detach()
    pairs = zip((-3, -2), (" are", " red"), (" is", " old"), strict=True)
    expected = [
        float(logits[at, model.to_single_token(one)] - logits[at, model.to_single_token(other)])
        for at, one, other in pairs
    ]
    assert both.log_prob.tolist() == pytest.approx(expected, abs=1e-4)
    assert both.summed().asked() == "' are red' rather than ' is old'"


SAYING = [case for case in zoo.kinds() if case.family in ("gpt2", "t5", "bart")]


@pytest.mark.parametrize("case", SAYING, ids=str)
def test_what_a_model_says_is_its_answer(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    start: dict[str, Any] = {}
    if given.decoder_tokens is not None:
        start = {"decoder_input": given.decoder_tokens[:, :1]}
    found = cm.log_prob_contributions(model, given.tokens, generate=4, **start)
    assert 4 < len(found.pos) <= 8
    said: dict[int, list[int]] = {0: [], 1: []}
    for row, sentence in enumerate(found.sentence.tolist()):
        said[sentence].append(int(found.target.ids[row, 0]))
    named = cm.log_prob_contributions(model, given.tokens, target=[said[0], said[1]], **start)
    assert named.equals(replace(found, provenance=named.provenance))
    original = getattr(model, "original_model", None)
    for row, answer in said.items():
        text = given.tokens[row : row + 1]
        if original is None:  # the most probable token each time
            alone = cm.log_prob_contributions(
                model, text, target=[answer], **{n: ids[row : row + 1] for n, ids in start.items()}
            )
            best = (
                cm.log_prob_contributions(model, alone.tokens.ids[:1], pos=alone.pos.tolist())
                if given.decoder_tokens is None
                else alone
            )
            assert best.target.ids[:, 0].tolist() == answer
            continue
        first = {n.replace("_input", "_input_ids"): ids[row : row + 1] for n, ids in start.items()}
        with torch.no_grad():
            whole = original.generate(text, max_new_tokens=4, do_sample=False, **first)[0]
        before = 1 if first else text.shape[1]
        assert whole[before:].tolist() == answer
    saliency = cm.gradient_x_input(model, given.tokens, generate=4, **start)
    assert saliency.target.mask.sum(dim=1).tolist() == [len(said[0]), len(said[1])]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"generate": 0}, "an integer from 1"),
        ({"generate": 2, "target": 5}, "a target of its own"),
        ({"generate": 10**6}, "too long: got"),
    ]
    for options, message in wrong:
        if "long" not in message or view_of(model).n_ctx is not None:
            with pytest.raises(cm.InvalidInput, match=message):
                cm.log_prob_contributions(model, given.tokens, **start, **options)


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_saliency_of_a_contrast_is_the_gradient_of_it(family: str) -> None:
    model, given = shared(case_of(family))
    plain: dict[str, Any] = {**keywords(given), "pos": -1}
    ofs: tuple[Any, ...] = ("logit", "log_prob")
    for of in ofs:
        both = cm.gradient_x_input(model, given.tokens, of=of, score="sum", **ONES, **plain)
        parts = [signed(model, given, token, of) for token in (ONES["target"], ONES["foil"])]
        assert relative(both.scores[:, 0, 0, 0], (parts[0] - parts[1]).abs()) <= 1e-8
    prob = cm.gradient_x_input(model, given.tokens, of="prob", score="sum", **ONES, **plain)
    parts = [signed(model, given, token, "prob") for token in (9, 7)]
    assert relative(prob.scores[:, 0, 0, 0], (parts[0] - parts[1]).abs()) <= 1e-8
    assert prob.unit == "prob"
    assert prob.provenance.options["foil"] == [7, 7]


def signed(model: Any, given: zoo.Inputs, token: int, of: str) -> Tensor:
    """Gradient times input of one token, its sign kept, by autograd on the view's own pass."""
    view = view_of(model)
    batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
    order = sorted(view.stacks, key=lambda stack: stack != "decoder")
    names = [view.stacks[stack][0].resid_in for stack in order]
    leaves = {n: x.clone().requires_grad_() for n, x in view.run(batch, names).values.items()}
    with torch.enable_grad():
        edits = {name: lambda tensor, name=name: leaves[name] for name in names}
        logits = view.run(batch, [], edits=edits, grad=True).logits
        last = logits[:, -1].double()
        value = {
            "logit": last[:, token],
            "log_prob": last.log_softmax(-1)[:, token],
            "prob": last.softmax(-1)[:, token],
        }[of]
        slopes = torch.autograd.grad(value.sum(), [leaves[name] for name in names])
    parts = [(leaves[name] * slope).sum(-1) for name, slope in zip(names, slopes, strict=True)]
    return torch.cat(parts, dim=1).detach()


def test_saliency_of_an_answer_is_that_of_each_token() -> None:
    model, given = shared(case_of("gpt2"))
    answers = [[11, 6], [13]]
    methods: list[Any] = [(cm.gradient_x_input, {}), (cm.integrated_gradients, {"steps": 8})]
    for method, options in methods:
        found = method(model, given.tokens, target=answers, **options)
        assert found.scores.shape[:4] == (2, 1, 1, 2)
        assert found.target.mask.tolist() == [[True, True], [True, False]]
        assert not found.scores[1, 0, 0, 1].any()
        whole = found.source.ids[:1]
        for step, token in enumerate(answers[0]):
            place = given.tokens.shape[1] - 1 + step
            alone = method(model, whole, target=token, pos=place, **options)
            assert relative(found.scores[0, 0, 0, step], alone.scores[0, 0, 0, 0]) <= 1e-10


@pytest.mark.once
def test_faithfulness_and_compare_ask_for_a_contrast() -> None:
    model = cm.load_demo("causal-lm")
    fmap = cm.value_zeroing(model, TEXT).normalize()
    plain = cm.faithfulness(model, TEXT, fmap, target=" are")
    odds = cm.faithfulness(model, TEXT, fmap, target=" are", foil={" is", " was"})
    assert [row.value for row in plain.rows] != [row.value for row in odds.rows]
    ids = fmap.source.ids[0]
    with torch.no_grad():
        logits = model(ids[None])[0, -1]
    a, i, w = (model.to_single_token(word) for word in (" are", " is", " was"))
    real = float(log_odds(logits, [a], [i, w]))
    drop = blanked(view_of(model), ids, Answer(" are", {" is", " was"}), 7)
    assert drop.real == pytest.approx(real, abs=1e-4)
    pairs = demo_pairs(count=3)
    asked: dict[str, Any] = {"methods": ["gradient_x_input", "value_zeroing"]}
    right, contrast = (cm.compare(model, pairs, contrast=c, **asked) for c in (False, True))
    assert right.correct == contrast.correct
    assert {r.value for r in right.rows} != {r.value for r in contrast.rows}
    with pytest.raises(cm.InvalidInput, match="have their own targets"):
        cm.compare(model, pairs, target=" are", **asked)
    with pytest.raises(cm.InvalidInput, match="no wrong word"):
        cm.compare(model, [TEXT], contrast=True, **asked)
    texts = cm.compare(model, [TEXT], target=" are", foil=" is", **asked)
    assert texts.sentences == 1


def test_several_predictions_of_a_sentence_add_up(tmp_path: Any) -> None:
    model, given = shared(case_of("gpt2"))
    found = cm.log_prob_contributions(model, given.tokens, target=[[11, 6], [13, 9]], by="head")
    again = LogProbContributions.load(found.save(tmp_path / "found.safetensors"))
    assert again.equals(found)
    one = found.select(batch=[2, 3])
    assert one.sentence.tolist() == [1, 1]
    whole = found.summed()
    assert torch.allclose(whole.select(batch=1).scores, one.summed().scores, equal_nan=True)
    assert whole.logits.shape == whole.scores.shape
    assert "11" not in whole.asked(0)
    with pytest.raises(cm.InvalidInput, match=r"cannot be added up.*\.summed\(\)\.top\(k\)"):
        found.top(2).summed()


@pytest.mark.once
def test_tables_of_several_predictions_join_on_sentence_and_position() -> None:
    model, texts = cm.load_demo("causal-lm"), ["the keys to the cabinet", "the key is"]
    options: dict[str, Any] = {"pos": [0, -1], "target": " are"}
    found = cm.log_prob_contributions(model, texts, by="head", **options)
    without = cm.knockout(model, texts, heads="L3H0", controls=0, **options)
    tables = {
        "scores": found.to_dataframe(),
        "asked": cm.query_contributions(model, texts, neurons="L2N78", **options).to_dataframe(),
        "cut": cm.attention_knockout(model, texts, **options).to_dataframe(),
        "without": without.to_dataframe(),
    }
    places = [*zip(range(4), found.sentence.tolist(), found.pos.tolist(), strict=True)]
    assert len({place[1:] for place in places}) == 4
    for name, table in tables.items():
        rows = table[["batch", "sentence", "pos"]].drop_duplicates()
        assert [*rows.itertuples(index=False, name=None)] == places, name
    (table,) = without.panels()
    assert isinstance(table, Table)
    assert table.columns[:3] == ("sentence", "position", "target")
    assert [row[:2] for row in table.rows[::3]] == [place[1:] for place in places]


@pytest.mark.once
def test_the_command_line_asks_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    asked = ["--target", " are", "--target", " were", "--foil", " is"]
    assert main(["log-prob-contributions", "causal-lm", TEXT, *asked]) == 0
    assert "' are' or ' were' rather than ' is': L3 attn" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert (
        main(["report", "causal-lm", TEXT, *asked, "--sections", "prediction", "-o", str(page)])
        == 0
    )
    told = page.read_text(encoding="utf-8")
    assert "rather than" in told
    assert "times more probable than the second (+" in told
    assert main(["attention", "causal-lm", TEXT, *asked]) == 2
    assert "this map is the same whatever the foil" in capsys.readouterr().err
    assert main(["report", "causal-lm", TEXT, "--target", " are on", "-o", str(page)]) == 2
    assert "a report is on one prediction: got 2 predictions" in capsys.readouterr().err
