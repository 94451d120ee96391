"""What the decoder lens and its results answer to what makes no sense: never a raw TypeError."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from test_decoder_lens_data import decoding

import tl_contextmix as cm
from tl_contextmix.errors import ContextMixError
from tl_contextmix.results import LayerwiseDecoding, LayerwiseLikelihood, LayerwiseScores

CASES = [case for case in zoo.cases() if case.encoder_decoder]


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the type checks that only tests switch on."""
    return function if function is cm.decoder_lens else inspect.unwrap(function)


@functools.cache
def model() -> Any:
    if not CASES:
        pytest.skip("this version has no encoder-decoder that runs")
    return zoo.build(CASES[0])


def nothing(output: str, reference: str | None, source: str) -> Any:
    return None


def text(output: str, reference: str | None, source: str) -> Any:
    return "5"


FORCED = {"mode": "teacher_forced", "references": "a dog"}
SCORES = {"mode": "scores", "target": [7]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input is empty"),
    ({"input": ""}, "input is empty"),
    ({"input": ["the cat", ""]}, "input is empty"),
    ({"references": ""}, "reference has no tokens"),
    ({"references": "  "}, "reference has no tokens"),
    ({"references": ["the", "a"]}, "2 references for 1 inputs"),
    ({"layer": 9}, "layer axis"),
    ({"mode": "think"}, "mode"),
    ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ({"num_beams": 0}, "num_beams: got 0"),
    ({"max_bytes": 0}, "max_bytes: got 0"),
    ({"mode": "scores"}, "nothing to score"),
    ({"mode": "scores", "target": ["the cat"]}, "not one token"),
    ({"mode": "scores", "target": [61]}, "not one token"),
    ({"input": ["a", "the"], "decoder_input": ["a cat", "a"]}, "same number of tokens|every row"),
    ({"mode": "teacher_forced", "categories": ["a"]}, "categories"),
    ({"mode": "generate", "target": [7]}, "target"),
    ({"mode": "scores", "target": [7], "num_beams": 2}, "num_beams would change nothing"),
    ({"mode": "scores", "target": [7], "max_new_tokens": 2}, "max_new_tokens would change nothing"),
    ({"mode": "scores", "target": [7], "metric": "KL"}, "mode would change nothing"),
    (
        {"mode": "teacher_forced", "references": "a dog", "decoder_input": "a"},
        "decoder_input would change nothing",
    ),
    ({"references": 5}, "this references: got 5"),
    ({"references": [5]}, "this references: got"),
    ({"references": [None]}, "this references: got"),
    ({"references": {}}, "this references: got"),
    ({"layer": "last"}, "this layer: got 'last'; expected an integer"),
    ({"layer": 1.0}, "this layer: got 1.0"),
    ({"layer": []}, "layer axis"),
    ({"mode": None}, "mode"),
    ({"max_new_tokens": "5"}, "max_new_tokens: got '5'; expected an integer from 1"),
    ({"max_new_tokens": 2.0}, "max_new_tokens: got 2.0"),
    ({"max_new_tokens": True}, "max_new_tokens: got True"),
    ({"max_new_tokens": [5]}, r"max_new_tokens: got \[5\]"),
    ({"num_beams": 2.0}, "num_beams: got 2.0"),
    ({"num_beams": None}, "num_beams: got None"),
    ({"num_beams": "2"}, "num_beams: got '2'"),
    ({"max_bytes": None}, "max_bytes: got None"),
    ({"max_bytes": "1"}, "max_bytes: got '1'"),
    ({"final_norm": None}, "final_norm: got None"),
    ({"final_norm": "no"}, "final_norm: got 'no'"),
    ({"tokenizer": "t5-small"}, "tokenizer would change nothing"),
    # Tokens
    ({**SCORES, "target": [5.7]}, r"this target: got \[5\.7\]"),
    ({**SCORES, "target": [True]}, r"this target: got \[True\]"),
    ({**SCORES, "target": "cat"}, "target: got 'cat'; expected a list of integers"),
    ({**SCORES, "target": 5}, "target: got 5; expected a list of integers"),
    ({**SCORES, "target": []}, "nothing to score"),
    ({**SCORES, "target": [None]}, r"this target: got \[None\]"),
    ({**SCORES, "target": [-1]}, "not one token: got -1"),
    # Metrics
    ({"metric": 5}, "this metric: got 5"),
    ({"metric": []}, r"no such metric: got \[\]"),
    ({"metric": {}}, r"no such metric: got {}"),
    ({"metric": [5]}, "this metric: got"),
    ({"metric": {5: nothing}}, "this metric: got"),
    ({"metric": {"mine": 5}}, "this metric: got"),
    ({"metric": [nothing, nothing]}, "each once"),
    ({"metric": "BLUE"}, "'BLUE'; expected one of"),
    ({"metric": nothing}, "metric 'nothing' gave no number: got None for the output"),
    ({"metric": text}, "metric 'text' gave no number: got '5'"),
    ({"metric": "BLEU"}, "BLEU without references"),
    ({"metric": "edit distance", "layer": 0}, "the last encoder layer among them"),
    ({"metric": "empty", "categories": 5}, "this categories: got 5"),
    ({"metric": "empty", "categories": {}}, "this categories: got {}"),
    ({"metric": "empty", "categories": "x"}, "this categories: got 'x'"),
    ({"metric": "empty", "categories": ["x", "y"]}, "2 categories"),
    ({"metric": "KL", "categories": [["x"] * 99]}, "at most"),
    ({"metric": "KL", "categories": [["all"]]}, "'all'"),
    # What would be ignored
    ({"metric": ["empty", "KL"], "categories": [["x"]]}, "do not go with metrics of an output"),
    ({"metric": "empty", "mode": "teacher_forced"}, "mode would change nothing"),
    ({"metric": "KL", "references": "a dog", "num_beams": 2}, "num_beams would change nothing"),
    ({"metric": "KL", "references": "a dog", "max_new_tokens": 2}, "max_new_tokens would change"),
    ({"metric": ["empty", "KL"], "references": "a", "decoder_input": "a"}, "decoder_input would"),
    ({"metric": "KL", "target": [7]}, "target would change nothing"),
    ({**FORCED, "num_beams": 2}, "num_beams would change nothing"),
    ({**FORCED, "max_new_tokens": 2}, "max_new_tokens would change nothing"),
    ({**SCORES, "references": "a dog"}, "references would change nothing"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_a_call_that_is_wrong_says_so(options: dict[str, Any], match: str) -> None:
    asked = {"input": "the cat", **options}
    with pytest.raises(cm.InvalidInput, match=match):
        bare(cm.decoder_lens)(model(), **asked)


def test_metrics_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_contextmix.methods.decoder_lens.answers import Lens

    def decoded(self: Any) -> None:
        raise AssertionError("a data set was decoded in vain")

    monkeypatch.setattr(Lens, "generate", decoded)
    monkeypatch.setattr(Lens, "forced", decoded)
    wrong: list[dict[str, Any]] = [
        {"metric": ["KL", "BLUE"]},
        {"metric": "BLEU"},
        {"metric": ["edit distance", "KL"], "layer": [0, 1]},
        {"metric": "empty", "categories": ["x", "y"]},
        {"metric": ["KL", "empty"], "categories": [["x"]]},
    ]
    for options in wrong:
        with pytest.raises(cm.InvalidInput):
            cm.decoder_lens(model(), "the cat", **options)


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers() -> None:
    ask = functools.partial(bare(cm.decoder_lens), model(), "the cat")
    plain = ask(max_new_tokens=3, num_beams=2)
    assert ask(max_new_tokens=np.int64(3), num_beams=torch.tensor(2)).equals(plain)
    scores = ask(mode="scores", target=[7, 9])
    for tokens in (np.array([7, 9]), torch.tensor([7, 9]), (np.int32(7), 9)):
        assert ask(mode="scores", target=tokens).equals(scores)


def test_what_agrees_with_its_metric_is_no_mistake() -> None:
    ask = functools.partial(cm.decoder_lens, model(), "the cat")
    plain = ask("a dog", metric="KL")
    assert ask("a dog", metric="KL", mode="teacher_forced").points == plain.points
    own = ask(metric="KL", max_new_tokens=3, decoder_input="a")
    forced = ask(mode="teacher_forced", max_new_tokens=3, decoder_input="a").metrics(metric="KL")
    assert own.points == forced.points
    renamed = ask("a dog", metric={"mine": "KL", "length": lambda out, right, source: len(out)})
    assert [point.value for point in renamed.select("mine")] == [p.value for p in plain.points]


@pytest.mark.parametrize("wrong", [None, 5, "t5-small", torch.nn.Linear(2, 2)])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(ContextMixError):
        bare(cm.decoder_lens)(wrong, "the cat")


# Results

ANSWERS: list[tuple[str, dict[str, Any], str]] = [
    ("first_correct_layer", {"references": 5}, "references cannot be read"),
    ("first_correct_layer", {"references": ["a"]}, "1 references"),
    ("metrics", {"reference": [5, 5, 5]}, "references cannot be read"),
    ("metrics", {"metric": 5}, "no such metric"),
    ("metrics", {"metric": []}, "no such metric"),
    ("metrics", {"metric": nothing}, "gave no number"),
    ("metrics", {"metric": "BLUE"}, "no such metric.*MRR"),
    ("metrics", {"reference": ["a"]}, "1 references"),
    ("metrics", {"reference": ["a", " ", "c"]}, "a word in it"),
    ("metrics", {"categories": ["x"]}, "categories do not fit"),
    ("metrics", {"categories": ["x", "all", "x"]}, "got 'all'; expected names other than 'all'"),
    ("metrics", {"categories": "xyz"}, "got 'xyz'; expected a list of 3, one per input"),
    ("metrics", {"categories": 5}, "categories cannot be read: got 5"),
    ("metrics", {"categories": {}}, "categories cannot be read: got {}"),
    ("metrics", {"categories": ["x", None, "y"]}, "None has no place among them"),
    ("metrics", {"categories": [1, 2, 3]}, "Turn numbers into text"),
]


@pytest.mark.parametrize(("name", "options", "match"), ANSWERS)
def test_what_a_decoding_cannot_answer(name: str, options: dict[str, Any], match: str) -> None:
    ask = bare(getattr(LayerwiseDecoding, name))
    with pytest.raises(cm.InvalidInput, match=match):
        ask(decoding(), **options)


def test_what_judged_answers_and_scores_cannot_answer() -> None:
    judged = cm.decoder_lens(model(), "the cat", "a dog", mode="teacher_forced")
    ask = functools.partial(bare(LayerwiseLikelihood.metrics), judged)
    for options, match in (
        ({"metric": 5}, "no such metric"),
        ({"metric": []}, "no such metric"),
        ({"metric": "BLEU"}, "no such metric: got 'BLEU'"),
        ({"metric": nothing}, "no such metric"),
        ({"categories": 5}, "categories cannot be read: got 5"),
        ({"categories": "x"}, "categories do not fit"),
        ({"categories": [[5]]}, "categories cannot be read"),
    ):
        with pytest.raises(cm.InvalidInput, match=match):
            ask(**options)
    one = cm.decoder_lens(model(), "the cat", mode="scores", target=["cat"])
    for places in ((), (0, 1), (0, 5), ("cat", "dog"), (0.0, 0)):
        with pytest.raises(cm.InvalidInput, match="token axis"):
            bare(LayerwiseScores.difference)(one, *places)
    two = cm.decoder_lens(model(), "the cat", mode="scores", target=["cat", "dog"])
    assert torch.equal(two.difference(*two.strings), two.difference())
