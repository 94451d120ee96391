"""The zoo itself: complete, built offline, and the same function as Hugging Face's models."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from watched import Watched

CASES = [pytest.param(case, id=case.id) for case in zoo.cases()]
PROCESSABLE = [pytest.param(case, id=case.id) for case in zoo.kinds() if zoo.processable(case)]
WITH_HF = [
    pytest.param(case, id=case.id) for case in zoo.cases() if case.family in zoo.hf_families()
]
REFUSED = [pytest.param(case, id=case.id) for case in zoo.REFUSED]

# Log-probs against Hugging Face, float64: 2e-14 at most where both compute in float64, and up to
# 1.7e-6 where one side has float32 inside (norms, softmax, rotary angles). Another model's
# log-probs are more than 1 away.
PARITY = 5e-6


def _class_name(model: Any) -> str:
    """The TransformerLens class of a model, without importing one."""
    names = [kind.__name__ for kind in type(model).__mro__]
    hosts = {case.host for case in zoo.cases()} | {case.host for case in zoo.REFUSED}
    return next(name for name in names if name in hosts)


def test_no_case_is_missing():
    built = {case.id for case in zoo.cases()}
    assert zoo.EXPECTED[zoo.major()] == built


def test_installed_major_is_the_expected_one():
    expected = os.environ.get("TL_CONTEXTMIX_EXPECT_MAJOR", str(zoo.major()))
    assert str(zoo.major()) == expected


def test_every_host_class_is_covered():
    expected = {
        2: {"HookedTransformer", "HookedEncoder"},
        3: {"HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "TransformerBridge"},
        4: {"TransformerBridge"},
    }
    assert {case.host for case in zoo.cases()} == expected[zoo.major()]


@pytest.mark.parametrize("case", CASES)
def test_build_gives_the_named_class_in_eval_mode_and_float64(case: zoo.Case):
    model = zoo.shared(case)
    assert _class_name(model) == case.host
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    logits = zoo.logits(model, zoo.inputs(case))
    assert logits.dtype == torch.float64
    assert logits.isfinite().all()
    assert model.tokenizer is not None


@pytest.mark.parametrize("case", WITH_HF)
def test_logits_are_those_of_hugging_face(case: zoo.Case):
    given = zoo.inputs(case)
    decoder = {} if given.decoder_tokens is None else {"decoder_input_ids": given.decoder_tokens}
    with torch.no_grad():
        theirs = zoo.hf_model(case.family)(given.tokens, **decoder).logits.log_softmax(-1)
    ours = zoo.logits(zoo.shared(case), given).log_softmax(-1)
    assert (ours - theirs).abs().max() < PARITY


@pytest.mark.parametrize("case", PROCESSABLE)
def test_processing_changes_weights_and_keeps_log_probs(case: zoo.Case):
    raw, processed = zoo.shared(case), zoo.build(case, processed=True)
    given = zoo.inputs(case)
    before = zoo.logits(raw, given).log_softmax(-1)
    after = zoo.logits(processed, given).log_softmax(-1)
    # Folding in float32 costs up to 2e-6.
    assert (before - after).abs().max() < PARITY
    assert any(
        not torch.equal(a, b)
        for name, a in raw.state_dict().items()
        if (b := processed.state_dict().get(name)) is not None and a.shape == b.shape
    )


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_build_is_deterministic_and_depends_on_the_seed(case: zoo.Case):
    torch.manual_seed(7)
    first = zoo.logits(zoo.build(case), zoo.inputs(case))
    torch.manual_seed(8)
    assert torch.equal(first, zoo.logits(zoo.build(case), zoo.inputs(case)))
    assert not torch.equal(first, zoo.logits(zoo.build(case, seed=1), zoo.inputs(case)))


@pytest.mark.parametrize("case", CASES)
def test_float32_model_holds_the_same_numbers(case: zoo.Case):
    double = dict(zoo.shared(case).named_parameters())
    single = dict(zoo.shared(case, torch.float32).named_parameters())
    assert double.keys() == single.keys()
    for name, value in double.items():
        assert single[name].dtype == torch.float32, name
        # Gemma's embedding is scaled when HookedTransformer loads it: one rounding. Others: none.
        torch.testing.assert_close(value.float(), single[name], rtol=2e-7, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_no_learned_tensor_is_left_at_a_default(case: zoo.Case):
    for name, parameter in zoo.shared(case).named_parameters():
        assert parameter.std() > 0.05 or not parameter.any(), name


@pytest.mark.parametrize("case", CASES)
def test_float32_inside_is_what_is_measured(case: zoo.Case):
    model = zoo.build(case)
    with _downcasts(model) as found:
        zoo.logits(model, zoo.inputs(case))
    assert found == zoo.FLOAT32_INSIDE.get((case.family, case.host), frozenset())


def test_inputs_are_words_of_the_stated_lengths():
    for case in zoo.cases():
        given = zoo.inputs(case, batch=3)
        assert given.tokens.shape == (3, 7 if case.encoder_decoder else 6)
        assert (given.decoder_tokens is not None) == case.encoder_decoder
        assert given.tokens.dtype == torch.int64


@pytest.mark.parametrize("case", CASES)
def test_tokenizer_reads_words_and_can_be_left_out(case: zoo.Case):
    tokenizer = zoo.shared(case).tokenizer
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "cat", "sat"]
    assert len(tokenizer) == 61
    assert zoo.build(case, tokenizer=False).tokenizer is None


def test_build_names_what_it_cannot_do():
    with pytest.raises(LookupError, match="no case llama-HookedEncoder; it has gpt2-"):
        zoo.build(zoo.Case("llama", "HookedEncoder"))
    with pytest.raises(LookupError, match="attn_only has no Hugging Face model"):
        zoo.hf_model("attn_only")
    for case in zoo.cases():
        if not zoo.processable(case):
            with pytest.raises(LookupError, match="no weight processing"):
                zoo.build(case, processed=True)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_model_can_be_built(case: zoo.RefusedCase):
    model = case.build()
    assert _class_name(model) == case.host
    assert not any(module.training for module in model.modules())


def test_tests_cannot_reach_the_network():
    with pytest.raises(AssertionError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(AssertionError, match="without a network"):
        socket.getaddrinfo("example.org", 80)


@contextmanager
def _downcasts(model: nn.Module) -> Iterator[set[str]]:
    """Collect in which parts of a model float64 tensors are turned into float32 ones."""
    found: set[str] = set()
    running: list[str] = []

    def see(func: Any, args: Any, out: Any) -> None:
        tensors = isinstance(out, torch.Tensor) and args and isinstance(args[0], torch.Tensor)
        if tensors and (args[0].dtype, out.dtype) == (torch.float64, torch.float32):
            found.update(part for part in ("norm", "attention") if part in running[-1].lower())
            # Rotary angles come from positions, not from the stream.
            assert found or "Rotary" in running[-1], running

    def enter(module: nn.Module, args: Any) -> None:
        running.append(type(module).__name__)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with Watched(see):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
