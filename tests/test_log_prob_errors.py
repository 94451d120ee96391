"""Questions that cannot be answered are refused in four parts, by name and value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from asked import case_of

import tl_contextmix as cm
from tl_contextmix.results import LogProbContributions

TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture
def model() -> Any:
    return zoo.build(case_of("gpt2"))


BAD_QUESTIONS = [
    (
        {"target": {"the cat"}},
        r"target is not one token: got 'the cat', which is 2: 'the', 'cat'.*pass an id",
    ),
    (
        {"target": 4, "foil": ["cat", "the cat"]},
        r"another number of tokens.*a target of 1 and a foil of 2 in text 1.*subtract log_prob",
    ),
    ({"target": {3, 4}, "foil": {4, 3}}, r"the foil is the target.*got the tokens \[\[3, 4\]\]"),
    ({"foil": 3}, r"a foil needs a target: got foil=3 and no target"),
    ({"target": 3, "foil": 61}, r"this is no foil: got 61"),
    ({"target": "the cat", "pos": 1}, r"has its own positions: got pos=1.*2 tokens"),
    ({"target": set()}, r"this is no target: got set\(\)"),
    (
        {"target": 3, "foil": 4, "by": "ff_neuron", "score": "rank"},
        r"knows no foil: got score='rank'",
    ),
    ({"target": "zebra"}, r"not in the vocabulary: got 'zebra', which becomes '<\|endoftext\|>'"),
    ({"target": ""}, r"this is no target: got ''"),
    ({"target": ["cat"]}, r"not one target for each text: got \['cat'\]; .* or a list of 2"),
    ({"target": 61}, r"no target: got 61; expected a text, .*ids from 0 to 60"),
    ({"target": [3, -1]}, r"no target: got -1"),
    ({"pos": 3}, r"no such position: got 3; expected an integer from -3 to 2"),
    ({"pos": -4}, r"no such position: got -4"),
    (
        {"norm": "beta"},
        r"norm: got 'beta'; expected one of \['frozen', 'frozen\+beta', ",
    ),
    ({"by": "token"}, r"this by: got 'token'; expected one of \['layer', 'head'"),
    ({"score": "size"}, r"this score: got 'size'; expected one of"),
    ({"score": "norm"}, r"no such choice by layer: got score='norm'.*'ff_neuron'.*Leave"),
    ({"by": "ff_neuron", "k": 0}, r"k: got 0; expected an integer from 1"),
    ({"max_bytes": 0}, r"max_bytes: got 0; expected an integer from 1"),
    ({"target": 3.0}, r"no target: got 3\.0; expected a text, a token id, or a set"),
    ({"target": True}, r"no target: got True"),
    ({"target": []}, r"not one target for each text: got \[\]"),
    ({"pos": torch.tensor([1, 5])}, r"no such position: got 5; expected"),
    ({"pos": []}, r"no such position: got \[\]"),
    ({"pos": "last"}, r"no such position: got 'last'; expected .* or 'all'"),
    ({"pos": 1.0}, r"no such position: got 1\.0"),
    ({"pos": True}, r"no such position: got True"),
    ({"by": ["head"]}, r"this by: got \['head'\]; expected one of"),
    ({"by": "ff_neuron", "k": 3.0}, r"k: got 3\.0; expected an integer from 1"),
    ({"max_bytes": True}, r"max_bytes: got True"),
    (
        {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "pos": 2},
        r"2, padding in sentence 0",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_QUESTIONS, ids=lambda v: str(v)[:40])
def test_question_that_cannot_be_asked(options: dict[str, Any], message: str, model: Any) -> None:
    ask: Any = cm.log_prob_contributions
    with pytest.raises(cm.InvalidInput, match=message):
        ask(model, TOKENS, **options)


def test_a_mask_is_needed_once() -> None:
    model = zoo.shared(case_of("bert"))
    for tokens, seen in ((TOKENS * 0 + 9, "0 masks in sentence 0"), (TOKENS * 0 + 4, "3 masks")):
        with pytest.raises(cm.InvalidInput, match=f"{seen}.*give pos="):
            cm.log_prob_contributions(model, tokens)
    masked = torch.tensor([[2, 9, 4, 3], [2, 4, 9, 3]])
    found = cm.log_prob_contributions(model, masked)
    assert found.pos.tolist() == [2, 1]


def test_no_predictions_without_a_vocabulary_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(case_of("bert"))
    monkeypatch.setattr(model, "_tl_contextmix_headless", True, raising=False)
    calls = [
        lambda: cm.log_prob_contributions(model, TOKENS, pos=1),
        lambda: cm.query_contributions(model, TOKENS, pos=1, neurons=[(1, 3)]),
        lambda: cm.knockout(model, TOKENS, pos=1, neurons=[(1, 3)]),
    ]
    for call in calls:
        with pytest.raises(cm.UnsupportedModel, match=r"without a masked-LM head"):
            call()


@pytest.mark.parametrize("named", [[(0, -1)], [(1, -1, 0)], [(-1, 0)]])
def test_nothing_counts_from_the_end(model: Any, named: list[tuple[int, ...]]) -> None:
    with pytest.raises(cm.InvalidInput, match="counted from 0"):
        cm.knockout(model, TOKENS, neurons=named, controls=0)
    with pytest.raises(cm.InvalidInput, match="counted from 0"):
        cm.knockout(model, TOKENS, heads=[(0, -1)], controls=0)


def test_components_belong_to_the_input_they_were_found_in(model: Any) -> None:
    found = cm.log_prob_contributions(model, TOKENS, by="ff_neuron", k=2)
    for other in (TOKENS.flip(1), TOKENS[:, :-1]):
        for call in (
            lambda other=other: cm.knockout(model, other, neurons=found),
            lambda other=other: cm.query_contributions(model, other, neurons=found),
            lambda other=other: cm.component_readouts(model, other, components=found),
        ):
            with pytest.raises(cm.InvalidInput, match="belong to another input"):
                call()


def test_position_and_target_are_those_of_the_contributions(model: Any) -> None:
    found = cm.log_prob_contributions(model, TOKENS, by="ff_neuron", k=2, pos=1)
    same = cm.log_prob_contributions(
        model, TOKENS, by="ff_neuron", k=2, pos=1, target=found.target.ids[:, 0].tolist()
    )
    assert torch.equal(found.scores, same.scores)
    asked = cm.knockout(
        model,
        TOKENS,
        neurons=found,
        pos=1,
        target=found.target.ids[:, 0].tolist(),
        controls=0,
    )
    left = cm.knockout(model, TOKENS, neurons=found, controls=0)
    assert torch.equal(left.after, asked.after)
    assert left.target.equals(asked.target)
    queries = cm.query_contributions(model, TOKENS, neurons=found)
    again = cm.query_contributions(model, TOKENS, neurons=found, pos=1)
    torch.testing.assert_close(queries.scores, again.scores, equal_nan=True, rtol=0, atol=0)


def unchecked(method: Any) -> Any:
    """A method that takes what its annotations exclude."""
    return method


def test_numbers_of_other_libraries_are_numbers(model: Any, tmp_path: Any) -> None:
    plain = {"pos": 1, "target": [3, 4], "by": "ff_neuron", "k": 2}
    expected = cm.log_prob_contributions(model, TOKENS, **plain)
    for kind in (np.array, torch.tensor):
        options = {name: kind(value) for name, value in plain.items() if name != "by"}
        options |= {"by": "ff_neuron", "max_bytes": kind(2**28)}
        found = unchecked(cm.log_prob_contributions)(model, TOKENS, **options)
        assert torch.equal(found.scores, expected.scores)
        assert LogProbContributions.load(found.save(tmp_path / "found")).equals(found)
        one = unchecked(cm.knockout)(
            model, TOKENS, neurons=kind([[1, 3]]), controls=kind(2), seed=kind(1), pos=kind(1)
        )
        same = cm.knockout(model, TOKENS, neurons=[(1, 3)], controls=2, seed=1, pos=1)
        assert torch.equal(one.controls, same.controls)
        one.save(tmp_path / "one")


@pytest.mark.parametrize("seed", ["a", None, 1.5, True])
def test_seed_that_is_none(model: Any, seed: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=f"this seed: got {seed!r}; expected an integer"):
        unchecked(cm.knockout)(model, TOKENS, neurons=[(1, 3)], seed=seed)


def test_any_integer_is_a_seed(model: Any) -> None:
    found = [
        cm.knockout(model, TOKENS, neurons=[(1, 3)], controls=3, seed=seed).controls
        for seed in (2**62, 2**63 - 1, -1)
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("chosen", [None, 5, [], [(1, 3)]])
def test_what_cannot_be_read_or_asked_about(model: Any, chosen: Any) -> None:
    with pytest.raises(cm.InvalidInput, match=r"this components: got .*expected a LogProbC"):
        unchecked(cm.component_readouts)(model, TOKENS, components=chosen)
    if chosen != [(1, 3)]:
        with pytest.raises(cm.InvalidInput, match=r"nothing (was chosen|to ask)|this neurons: got"):
            unchecked(cm.query_contributions)(model, TOKENS, neurons=chosen)


def test_hooks_on_what_is_read_from_the_stream(model: Any) -> None:
    """The last state would not have the model's own log-probability."""
    names = [name for name in model.hook_dict if name.startswith(("ln_final", "unembed"))]
    assert len(names) >= 2
    refused = 0
    for name in names:
        with model.hooks(fwd_hooks=[(name, lambda tensor, hook: None)]):
            found = cm.log_prob_contributions(model, TOKENS)
        torch.testing.assert_close(found.trajectory[:, -1], found.log_prob)
        with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor + tensor.flip(-1))]):
            with pytest.raises(cm.UnsupportedModel, match=r"hooks.*what .* reads.*final norm"):
                cm.log_prob_contributions(model, TOKENS)
            refused += 1
    assert refused == len(names)
