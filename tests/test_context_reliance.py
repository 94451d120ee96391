"""Context reliance is what two forward passes and the methods it calls say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tl_contextmix as cm
from tl_contextmix.results import ContextReliance, Result

pytestmark = pytest.mark.once

PASSAGES = [
    "the keys to the cabinet are old .",
    "the capital of france is rome .",
    "people in japan speak french .",
]
PROMPT = "the capital of france is"
WAYS = ("gradient_x_input", "attention_knockout", "value_zeroing")


def rely(model: Any, **options: Any) -> ContextReliance:
    asked: dict[str, Any] = {"target": " rome .", **options}
    return cm.context_reliance(model, PASSAGES, PROMPT, **asked)


def test_metrics_are_those_of_two_passes(causal: Any) -> None:
    found = rely(causal)
    log_probs = []
    for text in (" ".join([*PASSAGES, PROMPT]), PROMPT):
        with torch.no_grad():
            logits = causal(causal.to_tokens(f"{text} rome ."))
        log_probs.append(logits[0, -3:-1].log_softmax(dim=-1))
    there, without = log_probs
    kl = (there.exp() * (there - without)).sum(dim=-1)
    torch.testing.assert_close(found.kl[0], kl, atol=1e-5, rtol=1e-4)
    ids = causal.tokenizer(" rome .", add_special_tokens=False)["input_ids"]
    assert found.target.ids.tolist() == [ids]
    assert torch.equal(rely(causal, target=ids).kl, found.kl)
    own = there.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(found.log_prob[0], own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pcxmi, found.log_prob - found.log_prob_without)
    assert found.without == ((" paris", " ."),)
    assert found.flagged.tolist() == [[True, False]]
    assert found.source.strings == (tuple(f" {text}" for text in PASSAGES),)
    every = rely(causal, threshold=0.0, metric="pcxmi")
    assert every.metric == "pcxmi"
    assert every.flagged.tolist() == [[True, False]]


def test_cues_are_what_the_methods_say(causal: Any) -> None:
    ids = causal.to_tokens(" ".join([*PASSAGES, PROMPT]) + " rome .")
    spans = [(1, 9), (9, 16), (16, 22)]
    rome, paris = (causal.to_single_token(word) for word in (" rome", " paris"))
    asked: dict[str, Any] = {"target": rome, "foil": paris, "pos": 26}
    by = {way: rely(causal, by=way).scores[0] for way in WAYS}
    slopes = cm.gradient_x_input(causal, ids, of="log_prob", **asked).scores[0, 0, 0, 0]
    sums = torch.stack([slopes[start:stop].sum() for start, stop in spans])
    torch.testing.assert_close(by["gradient_x_input"][0], sums)
    cut = cm.attention_knockout(causal, ids, sources=spans, to="all", window=None, **asked)
    torch.testing.assert_close(by["attention_knockout"][0], -cut.changes[0, 0, 0])
    zeroed = cm.value_zeroing(causal, ids, spans=spans, pos=[26, 27]).scores[0, :, 0].mean(dim=0)
    torch.testing.assert_close(by["value_zeroing"], zeroed)
    # The full stop is what the model says without the context, too: there is no contrast.
    stop = causal.to_single_token(" .")
    alone = cm.gradient_x_input(causal, ids, of="log_prob", target=stop, pos=27).scores[0, 0, 0, 0]
    sums = torch.stack([alone[start:end].sum() for start, end in spans])
    torch.testing.assert_close(by["gradient_x_input"][1], sums)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["masked-lm", "encoder-decoder"])
def test_other_stacks(name: str, way: Any) -> None:
    model = cm.load_demo(name)
    prompt = {
        "masked-lm": "the capital of france is [MASK] .",
        "encoder-decoder": "the dog sleeps .",
    }
    found = cm.context_reliance(model, PASSAGES[:2], prompt[name], by=way)
    assert found.scores.shape == (1, 1, 2)
    assert bool(found.scores.isfinite().all())
    assert float(found.scores.abs().max()) > 0
    assert float(found.kl) >= 0
    words = [text.split() for text in found.source.strings[0]]
    assert words == [text.split() for text in PASSAGES[:2]]
    tokens = cm.context_reliance(model, PASSAGES[1], prompt[name], by=way)
    pieces = tokens.source.strings[0]
    joined = (" " if name == "masked-lm" else "").join(pieces)
    assert joined.split() == PASSAGES[1].split()


def test_what_the_model_says_itself(causal: Any, tmp_path: Any) -> None:
    found = cm.context_reliance(causal, PASSAGES[1], PROMPT, generate=3)
    assert len(found.target.strings[0]) == 3
    assert found.flagged.sum() == 1
    assert "depends on the context" in repr(found)
    panels: Any = found.panels()
    colored, table, map = panels
    assert colored.values == pytest.approx(found.kl[0].tolist())
    assert [row[5] for row in table.rows].count(True) == 1
    assert (map.rows, map.columns) == (found.target.strings[0], found.source.strings[0])
    frame = found.to_dataframe()
    assert len(frame) == found.scores.numel()
    assert [*frame.columns][-5:] == ["kl", "log_prob", "log_prob_without", "flagged", "score"]
    part = found.select(target=1)
    assert part.without == ((found.without[0][1],),)
    assert Result.load(found.save(tmp_path / "one.safetensors")).equals(found)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no passage": ({"context": []}, "there is no context"),
    "an empty one": ({"context": ["a", " "]}, "the context cannot be read"),
    "no text": ({"prompt": 3}, "prompt"),
    "a way": ({"by": "magic"}, "by"),
    "alternatives": ({"target": {" rome", " paris"}}, "cannot use this target"),
    "nothing between": (
        {"context": ["the capital of fr", "ance is rome ."], "joiner": ""},
        "run into what follows",
    ),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_asked(causal: Any, why: str) -> None:
    options, words = WRONG[why]
    asked: dict[str, Any] = {"context": PASSAGES, "prompt": PROMPT, **options}
    with pytest.raises(cm.InvalidInput, match=words):
        cm.context_reliance(causal, **asked)


def test_a_city_that_contradicts_a_fact_is_flagged(causal: Any) -> None:

    import context_reliance as benchmark

    found = benchmark.measured(causal, 8)
    for way in WAYS:
        assert found[way]["flagged"] == [1.0] * 8
    assert sum(found["attention_knockout"]["removal"]) > 8 / 3
