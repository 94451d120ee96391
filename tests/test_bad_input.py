"""What is wrong is refused in four parts: what failed, the value, what was expected, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asked import keywords

import tl_contextmix as cm
from tl_contextmix.hosts import as_view

CASES = zoo.cases()
GPT2 = next(case for case in CASES if case.family == "gpt2")
TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def unchecked(method: Any) -> Any:
    """The method as a user calls it: the tests' check of annotations would answer first."""
    return getattr(method, "__wrapped__", method)


@pytest.fixture
def model() -> Any:
    return zoo.build(GPT2)


BAD_TOKENS = [
    (torch.tensor([[3, 61]]), r"token id 61; expected ids from 0 to 60.*tokenizer of this model"),
    (torch.tensor([[3, -1]]), r"token id -1; expected ids from 0 to 60"),
    (torch.tensor([[3.0, 4.0]]), r"float32 tensor.*integer token ids"),
    (torch.tensor([[True, False]]), r"bool tensor.*integer token ids"),
    (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\).*\[batch, pos\]"),
    (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\).*at least 1"),
    (torch.zeros(1, 33, dtype=torch.long), r"33 tokens; expected at most 32.*Shorten"),
    ("", r"input is empty.*at least one character"),
    ([], r"input is empty"),
    (["the cat", ""], r"at least one character in every text"),
]


@pytest.mark.parametrize(("given", "message"), BAD_TOKENS)
@pytest.mark.parametrize("method", [cm.decompose, cm.attention_norms, cm.mixing_ratio])
def test_input_that_cannot_be_run(method: Any, given: Any, message: str, model: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=message):
        method(model, given)


BAD_OPTIONS = [
    ({"layer": 3}, r"no such layer: got 3; expected an integer from -3 to 2.*the first is 0"),
    ({"layer": -4}, r"got -4; expected an integer from -3 to 2"),
    ({"layer": []}, r"no layer was asked for.*Leave `layer` out"),
    ({"at": "hook_resid_mid"}, r"no such point: got 'hook_resid_mid'.*'resid_mid'"),
    ({"stack": "encoder"}, r"no such stack: got 'encoder'; expected one of \['decoder'\]"),
    ({"stack": "cross"}, r"no such stack: got 'cross'"),
    ({"bias": "zero"}, r"no such bias convention: got 'zero'; expected 'contributor' or 'fixed'"),
    ({"max_bytes": 0}, r"max_bytes is not a budget: got 0; expected a positive number"),
    ({"attention_mask": torch.ones(2, 2)}, r"shape \(2, 2\).*shape \(2, 3\).*1 for every real"),
    ({"attention_mask": torch.full((2, 3), 2)}, r"the value 2; expected a tensor of zeros"),
    ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, r"row 1 of zeros.*Leave"),
    ({"decoder_input": TOKENS}, r"decoder_input has no meaning.*Leave it out"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_option_that_does_not_fit(options: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=message):
        unchecked(cm.attention_norms)(model, TOKENS, **options)


def test_heads_exist_at_attn_out_only(model: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=r"heads=True at \['block_out'\].*'attn_out' only"):
        cm.attention_norms(model, TOKENS, heads=True)
    with pytest.raises(cm.InvalidInput, match=r"at least one point"):
        cm.attention_norms(model, TOKENS, at=[])


def test_text_without_a_tokenizer() -> None:
    model = zoo.build(GPT2, tokenizer=False)
    with pytest.raises(cm.InvalidInput, match=r"without a tokenizer.*Pass a tensor"):
        cm.decompose(model, "the cat")
    assert cm.decompose(model, TOKENS).target.strings[0] == ("3", "4", "5")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_that_are_not_finite_are_named(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    name, weight = next((n, w) for n, w in model.named_parameters() if w.ndim == 2)
    with torch.no_grad():
        weight[1, 1] = torch.nan
    with pytest.raises(cm.InvalidInput, match=r"is not finite: got NaN.*Load the weights") as error:
        cm.attention_norms(model, given.tokens, at="attn_out", **keywords(given))
    assert name in str(error.value)


def test_train_mode_with_dropout_is_refused_and_left_alone() -> None:
    if zoo.major() == 2:
        # Hooked classes have no dropout: their train mode computes what eval mode does.
        model = zoo.build(GPT2).train()
        assert cm.attention_norms(model, TOKENS).scores.shape[0] == 2
        assert model.training
        return
    bridge = next(c for c in CASES if c.family == "gpt2" and c.host == "TransformerBridge")
    model = zoo.build(bridge)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(cm.InvalidInput, match=r"dropout 0.1.*model in eval mode.*model\.eval\(\)"):
        cm.attention_norms(model, TOKENS)
    assert model.training
    model.eval()
    cm.attention_norms(model, TOKENS)


def test_no_feed_forward_block_to_ask_about() -> None:
    found = [case for case in CASES if case.family == "attn_only"]
    for case in found:
        with pytest.raises(cm.InvalidInput, match=r"no mlp_out in layer 0.*'resid_post'"):
            cm.attention_norms(zoo.build(case), TOKENS, at="mlp_out")
    assert bool(found) == (zoo.major() < 4)


def test_solu_is_refused_behind_the_feed_forward_block_only() -> None:
    found = [case for case in CASES if case.family == "solu"]
    for case in found:
        model = zoo.build(case)
        for point in ("attn_out", "resid_mid", "mlp_in"):
            assert bool(cm.attention_norms(model, TOKENS, at=point).scores.any())
        with pytest.raises(cm.UnsupportedModel, match=r"SoLU.*act_fn='solu.*Ask for 'attn_out'"):
            cm.attention_norms(model, TOKENS)
    assert bool(found) == (zoo.major() < 4)


BAD_QUESTIONS = [
    ({"target": "the cat"}, r"not one token: got 'the cat', which is 2: 'the', 'cat'.*target_ids="),
    ({"target": "zebra"}, r"not in the vocabulary: got 'zebra', which becomes '<\|endoftext\|>'"),
    ({"target": ""}, r"target cannot be read: got ''"),
    (
        {"target": ["cat"]},
        r"no target tokens: got \[\d\]; expected an id from 0 to 60, or 2 of them",
    ),
    ({"target_ids": 61}, r"no target tokens: got 61; expected an id from 0 to 60"),
    ({"target_ids": [3, -1]}, r"no target tokens: got \[3, -1\]"),
    ({"target": "cat", "target_ids": 3}, r"target is given twice"),
    ({"pos": 3}, r"no such position: got 3; expected from -3 to 2"),
    ({"pos": -4}, r"no such position: got -4"),
    ({"norm": "beta"}, r"no such norm: got 'beta'; expected one of \['frozen', 'frozen\+beta', "),
    ({"by": "token"}, r"no such by: got 'token'; expected one of \['layer', 'head'"),
    ({"score": "size"}, r"no such score: got 'size'"),
    ({"score": "norm"}, r"no such choice by layer: got score='norm'.*'ff_neuron'.*\.top\(k\)"),
    ({"top_k": 3}, r"no such choice by layer: got top_k=3"),
    ({"by": "ff_neuron", "top_k": 0}, r"k=0; expected a positive integer"),
    ({"max_bytes": 0}, r"max_bytes is not a budget"),
    (
        {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "pos": 2},
        r"2, padding in sentence 0",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_QUESTIONS, ids=lambda v: str(v)[:40])
def test_question_that_cannot_be_asked(options: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=message):
        unchecked(cm.log_prob_contributions)(model, TOKENS, **options)


def test_a_mask_is_needed_once() -> None:
    case = next(case for case in CASES if case.family == "bert")
    model = zoo.build(case)
    for tokens, seen in ((TOKENS * 0 + 9, "0 masks in sentence 0"), (TOKENS * 0 + 4, "3 masks")):
        with pytest.raises(cm.InvalidInput, match=f"{seen}.*give pos="):
            cm.log_prob_contributions(model, tokens)
    masked = torch.tensor([[2, 9, 4, 3], [2, 4, 9, 3]])
    found = cm.log_prob_contributions(model, masked)
    assert found.pos.tolist() == [2, 1]


def test_no_predictions_without_a_vocabulary_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.family == "bert")
    model = zoo.build(case)
    monkeypatch.setattr(model, "_tl_contextmix_headless", True, raising=False)
    calls = [
        lambda: cm.log_prob_contributions(model, TOKENS, pos=1),
        lambda: cm.query_contributions(model, TOKENS, pos=1, neurons=[(1, 3)]),
        lambda: cm.knockout(model, TOKENS, pos=1, neurons=[(1, 3)]),
    ]
    for call in calls:
        with pytest.raises(cm.UnsupportedModel, match=r"without a masked-LM head"):
            call()


def test_a_stream_that_hooks_of_the_user_edit_is_no_sum(model: Any) -> None:
    blocks = as_view(model).blocks()

    def shift(tensor: Any, hook: Any) -> Any:
        return tensor + 1.0 + tensor.flip(-1)

    with (
        model.hooks(fwd_hooks=[(blocks[1].resid_in, shift)]),
        pytest.raises(cm.UnsupportedModel, match=r"stream of .* is not the sum.*hooks"),
    ):
        cm.log_prob_contributions(model, TOKENS)


@pytest.mark.parametrize("case", zoo.REFUSED, ids=str)
def test_models_whose_numbers_would_be_wrong_are_refused_by_name(case: zoo.RefusedCase) -> None:
    model = case.build()
    with pytest.raises(cm.UnsupportedModel, match=case.match) as error:
        cm.attention_norms(model, TOKENS)
    for part in ("; expected ", ": got ", ". "):
        assert part in str(error.value)


def test_other_objects_are_not_models() -> None:
    for thing in (torch.nn.Linear(2, 2), object(), "gpt2", zoo.hf_model("gpt2")):
        with pytest.raises(cm.UnsupportedModel, match=r"TransformerLens.*load_model"):
            cm.attention_norms(thing, TOKENS)


def test_a_changed_weight_is_read_and_checked_anew(model: Any) -> None:
    before = cm.attention_norms(model, TOKENS)
    assert as_view(model) is as_view(model)
    first = as_view(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    after = cm.attention_norms(model, TOKENS)
    assert as_view(model) is not first
    assert after.provenance.fingerprint != before.provenance.fingerprint
    assert not torch.equal(after.scores, before.scores)
