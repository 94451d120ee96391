"""NaN has a cause: it is named with the remedy that works, whatever was asked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, view_of
from torch import nn

import tl_contextmix as cm
from tl_contextmix.adapters.weight_processing import require_finite
from tl_contextmix.core.finite import why_not_finite

pytestmark = pytest.mark.mostly_once

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
TEXTS = ["the cat sat on the mat", "dog"]


def model_of(family: str, dtype: torch.dtype) -> Any:
    return zoo.build(case_of(family), dtype=dtype)


def overflowing(dtype: torch.dtype) -> Any:
    """A model of two blocks that write more than float16 can hold together, on every text."""
    model = model_of("gpt2", dtype)
    named = [(name.rpartition("mlp")[2], weight) for name, weight in model.named_parameters()]
    biases = [w for n, w in named if n == ".b_out" or ("c_proj" in n and n.endswith("bias"))]
    assert len(biases) > 1
    with torch.no_grad():
        for bias in biases:
            bias.fill_(6e4)
    return model


ASKED = {
    "attention": lambda model: cm.attention(model, IDS),
    "attention_norms": lambda model: cm.attention_norms(model, IDS),
    "value_zeroing": lambda model: cm.value_zeroing(model, IDS),
    "log_prob_contributions": lambda model: cm.log_prob_contributions(model, IDS),
    "gradient_x_input": lambda model: cm.gradient_x_input(model, IDS),
    "knockout": lambda model: cm.knockout(model, IDS, heads=[(0, 0)], controls=0),
    "ff_memories": lambda model: cm.ff_memories(model, IDS),
}


@pytest.mark.every
@pytest.mark.parametrize("name", ASKED)
def test_float16_that_overflows_on_every_text(name: str) -> None:
    model = overflowing(torch.float16)
    match = r"float16 overflows.*65504: got NaN or infinity in .*Load the model in float32 or bfl"
    with pytest.raises(cm.InvalidInput, match=match):
        ASKED[name](model)
    report = cm.check(model)
    assert not report.ok
    assert "float16 overflows" in str(report)
    assert "float16 overflows" in report.cause
    assert "float16" not in cm.check(overflowing(torch.float32)).cause


def test_float16_that_overflows_on_some_texts() -> None:
    """The check's four tokens are fine, the text is not."""
    model = model_of("gpt2", torch.float16)
    table = next(w for name, w in model.named_parameters() if "wte" in name or name == "embed.W_E")
    with torch.no_grad():
        table[IDS[0, 1]] = 6e4
        table[IDS[0, 1], ::2] *= -1
    view = view_of(model)
    name = view.blocks()[0].resid_in
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor * 8)]):
        for ask in (cm.attention, cm.decompx):
            with pytest.raises(cm.InvalidInput, match=f"float16 overflows.*{name}, at a real tok"):
                ask(model, IDS)


def test_logits_alone_that_overflow_refuse_predictions_and_keep_maps() -> None:
    model = model_of("gpt2", torch.float16)
    view = view_of(model)
    names = [f"{name}" for name in ("ln_final.hook_normalized",) if name in model.hook_dict]
    with model.hooks(fwd_hooks=[(names[0], lambda tensor, hook: tensor * torch.inf)]):
        cm.attention(model, IDS)
        for ask in (
            lambda: cm.log_prob_contributions(model, IDS),
            lambda: cm.gradient_x_input(model, IDS),
            lambda: cm.knockout(model, IDS, heads=[(0, 0)], controls=0),
            lambda: cm.ff_memories(model, IDS, layer=0),
        ):
            with pytest.raises(cm.InvalidInput, match="float16 overflows.*in the logits"):
                ask()
    assert view.readout.refusal == ""


@pytest.mark.parametrize("projection", ["model", "frozen"])
def test_memories_below_a_layer_that_is_not_finite_say_so(projection: Any) -> None:
    """They are compared with the model's own best token; NaN would be that of every text."""
    model = zoo.shared(case_of("mistral", host="TransformerBridge"))
    with pytest.raises(cm.InvalidInput, match="a mask in float64 turns into NaN.*in the logits"):
        cm.ff_memories(model, TEXTS, layer=0, projection=projection, padding_side="right")
    # More padding than a window has tokens is nothing to read; before the text it is left out.
    cm.ff_memories(model, TEXTS, layer=0, projection=projection, padding_side="left")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_memories_of_a_cache_whose_last_state_is_not_finite_say_so(wrong: float) -> None:
    model = zoo.shared(case_of("gpt2"))
    cache = model.run_with_cache(IDS)[1]
    cache.cache_dict[view_of(model).blocks()[-1].resid_out][0, 1, 3] = wrong
    with pytest.raises(cm.InvalidInput, match="not finite"):
        cm.ff_memories(model, IDS, layer=0, cache=cache)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"mode": "teacher_forced"}, {"mode": "scores", "target": [7]}]
)
def test_a_decoder_whose_numbers_are_not_finite_says_so(options: dict[str, Any]) -> None:
    model = zoo.build(case_of("bart", "t5", host="TransformerBridge"), dtype=torch.float32)
    name = view_of(model).stacks["decoder"][-1].resid_out
    cm.decoder_lens(model, IDS + 5, **options)
    with (
        model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor * torch.inf)]),
        pytest.raises(cm.InvalidInput, match="NaN or infinity in the logits"),
    ):
        cm.decoder_lens(model, IDS + 5, **options)


def test_weights_that_float16_cannot_hold() -> None:
    model = model_of("gpt2", torch.float16)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1e6)
    with pytest.raises(cm.InvalidInput, match="weight .* is not finite.*65504.*float32 or bfl"):
        cm.check(model)


def test_weights_whose_sum_float16_cannot_hold_are_finite() -> None:
    weights = {"large": torch.full((4, 4), 6e4).half(), "wide": torch.ones(3, dtype=torch.float64)}
    require_finite(weights)
    for bad in (torch.nan, torch.inf):
        weights["wide"][1] = bad
        with pytest.raises(cm.InvalidInput, match="the weight wide is not finite"):
            require_finite(weights)


@pytest.mark.newest
def test_masks_in_float64_that_turn_into_nan() -> None:
    """Where rows have to run as they are; else padding on the left is left out."""
    model = model_of("llama", torch.float64)
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    name = view_of(model).blocks()[0].resid_in
    cm.attention(model, IDS, attention_mask=mask)
    match = r"a mask in float64 turns into NaN.*Load the model in float32, pad on the other side"
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor)]):
        with pytest.raises(cm.InvalidInput, match=match):
            cm.attention(model, IDS, attention_mask=mask)
        cm.attention(model, IDS, attention_mask=mask.flip(1))
    alone = model_of("llama", torch.float32)
    with alone.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor)]):
        cm.attention(alone, IDS, attention_mask=mask)


@pytest.mark.every
def test_each_precision_has_its_remedy() -> None:
    half = why_not_finite("x", torch.bfloat16)
    assert "in float32 instead of torch.bfloat16" in half
    assert "hooks of your own" in why_not_finite("x", torch.float32)
    assert "hooks of your own" in why_not_finite("x", torch.float64)


# Quantized weights, and what reads no tokens


@pytest.mark.newest
def test_quantized_weights_are_named() -> None:
    model = model_of("gpt2", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.ao.quantization.quantize_dynamic(
            model.original_model, {nn.Linear}, dtype=torch.qint8, inplace=True
        )
    packed = model_of("llama", torch.float32)
    weight = next(w for n, w in packed.named_parameters() if "gate_proj" in n)
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    for one in (model, packed):
        for ask in (cm.check, lambda model: cm.attention(model, IDS)):
            with pytest.raises(cm.UnsupportedModel, match=r"quantized.*without quantization, in b"):
                ask(one)
