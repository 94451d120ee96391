"""DecoderLens and what users set on their model: generation settings and hooks on the encoder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import oracle_decoding as oracle
import pytest
import torch
import zoo
import zoo_build
import zoo_configs
from asked import case_of, view_of
from test_decoder_lens import outputs
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.encoder_decoder.generation_config import _OF_SOURCE_TOKENS, _REFUSED

pytestmark = pytest.mark.once

CASES = [case for case in zoo.cases() if case.encoder_decoder]
EACH = pytest.mark.parametrize("case", CASES, ids=str)
# One bridge is enough: transformers applies settings, the same way for every family.
BART = [case for case in CASES if case.family == "bart"]
LENGTH = 8


@functools.cache
def reference() -> Any:
    """The Hugging Face model, which no test changes."""
    return zoo.hf_model("bart")


@pytest.fixture(scope="module")
def shared() -> Any:
    """A bridge whose settings are changed and reset."""
    if not BART:
        pytest.skip("this version has no encoder-decoder that runs")
    return zoo.build(BART[0])


@pytest.fixture
def bridge(shared: Any) -> Iterator[Any]:
    """The same bridge, with its own settings."""
    settings = shared.original_model.generation_config
    before = dict(vars(settings))
    yield shared
    vars(settings).clear()
    vars(settings).update(before)


def tokens() -> Tensor:
    return zoo.inputs(BART[0], batch=3).tokens


FOLLOWED: dict[str, Any] = {
    "bad_words_ids": [[7], [9, 12]],
    "begin_suppress_tokens": [7, 20, 30, 40, 50],
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "eos_token_id": [2, 10, 11, 12, 13, 14, 15],
    "exponential_decay_length_penalty": (1, 3.0),
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 11,
    "length_penalty": -4.0,
    "min_length": 7,
    "min_new_tokens": 7,
    "no_repeat_ngram_size": 1,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 5.0,
    "sequence_bias": [[[7], 30.0]],
    "suppress_tokens": list(range(20, 50)),
    "watermarking_config": {"bias": 20.0, "seeding_scheme": "lefthash"},
}
# Without an effect on these outputs: nothing invalid appears, and beams are compared renormalised.
_SILENT = {"remove_invalid_values", "renormalize_logits"}
_ENDING = {"early_stopping", "length_penalty", "min_length", "min_new_tokens"}
_ENDING |= {"exponential_decay_length_penalty"}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_setting_is_followed_from_every_layer(bridge: Any, name: str) -> None:
    settings = bridge.original_model.generation_config
    ends = {"eos_token_id": [2, 10, 11, 12, 13, 14, 15, 16, 17]} if name in _ENDING else {}
    vars(settings).update(ends)
    wanted, changed = {**ends, name: FOLLOWED[name]}, False
    for beams in (1, 2):
        ask = functools.partial(
            cm.decoder_lens, bridge, tokens(), max_new_tokens=LENGTH, num_beams=beams
        )
        vars(settings).pop(name, None)
        setattr(settings, name, ends.get(name))
        plain = ask()
        setattr(settings, name, FOLLOWED[name])
        found = ask()
        for layer in found.layers:
            short = oracle.truncated(reference(), layer)
            right = oracle.said(
                short, tokens(), max_new_tokens=LENGTH, num_beams=beams, **wanted
            ).tolist()
            for row, answer in enumerate(outputs(found, layer)):
                assert right[row][: len(answer)] == answer, (beams, layer, row)
                assert set(right[row][len(answer) :]) <= {reference().config.pad_token_id}
            changed |= outputs(found, layer) != outputs(plain, layer)
    assert changed == (name not in _SILENT)


SET_TO_SOMETHING = {
    "constraints": ["x"],
    "force_words_ids": [[7]],
    "stop_strings": ["the"],
    "cache_implementation": "static",
    "token_healing": True,
    "use_mtp": True,
}


@pytest.mark.parametrize("name", _REFUSED)
def test_a_setting_that_cannot_be_followed_is_refused_by_name(bridge: Any, name: str) -> None:
    settings = bridge.original_model.generation_config
    setattr(settings, name, SET_TO_SOMETHING.get(name, 3))
    asked: list[dict[str, Any]] = [{}, {"mode": "teacher_forced"}]
    for options in asked:
        with pytest.raises(cm.UnsupportedModel, match=f"generation settings.*{name}="):
            cm.decoder_lens(bridge, tokens(), **options)
    for neutral in _REFUSED[name]:
        setattr(settings, name, neutral)
        cm.decoder_lens(bridge, tokens(), max_new_tokens=2)


# What the arguments of `decoder_lens` say, or what says nothing about the tokens.
_ARGUMENTS = set("max_length max_new_tokens do_sample num_beams use_cache".split())
_SAMPLING = set("temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split())
_NOT_ABOUT_TOKENS = set(
    "cache_config max_cache_len output_attentions output_hidden_states output_scores output_logits "
    "return_dict_in_generate return_legacy_cache pad_token_id bos_token_id decoder_start_token_id "
    "compile_config disable_compile continuous_batching_config low_memory transformers_version "
    # Of an assistant, which is given to generate() itself.
    "is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind "
    "target_lookbehind assistant_ensemble_weight speculation_type".split()
)


def test_every_setting_of_transformers_has_its_place() -> None:
    from transformers import GenerationConfig

    known = {*FOLLOWED, *_REFUSED, *_ARGUMENTS, *_SAMPLING, *_NOT_ABOUT_TOKENS}
    assert {name for name in vars(GenerationConfig()) if name[0] != "_"} <= known
    assert set(_OF_SOURCE_TOKENS) < set(FOLLOWED)


def test_sampling_and_beams_of_the_settings_are_the_arguments_affair(bridge: Any) -> None:
    plain = cm.decoder_lens(bridge, tokens(), max_new_tokens=LENGTH)
    settings = bridge.original_model.generation_config
    vars(settings).update(
        do_sample=True, num_beams=3, top_k=5, use_cache=False, max_length=3, output_attentions=True
    )
    assert cm.decoder_lens(bridge, tokens(), max_new_tokens=LENGTH).equals(plain)


# Hooks


def double(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 2


NORMED = [case for case in CASES if case.family not in ("bart", "marian")]


@pytest.mark.parametrize("case", NORMED, ids=str)
def test_hooks_on_the_encoders_final_norm_take_part(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    place = "encoder_ln_final.hook_out"
    if case.host == "HookedEncoderDecoder":
        place = "encoder_final_ln.hook_normalized"
    ask = functools.partial(cm.decoder_lens, model, given.tokens, mode="scores", target=[7, 9])
    seen = []
    with model.hooks(fwd_hooks=[(place, lambda tensor, hook: seen.append(tensor.shape))]):
        plain = ask()
    assert len(seen) == len(plain.layers), "each layer once"
    with model.hooks(fwd_hooks=[(place, double)]):
        edited = ask()
        logits = zoo.logits(model, zoo.Inputs(given.tokens, given.decoder_tokens[:, :1]))
    assert not torch.allclose(edited.logits[:, 0], plain.logits[:, 0])
    torch.testing.assert_close(edited.logits[:, -1], logits[:, -1, [7, 9]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain.logits[:, -1], logits[:, -1, [7, 9]])
    # Hooked, the bridge itself decodes; unhooked, its plain twin.
    torch.testing.assert_close(ask().logits, plain.logits, rtol=1e-5, atol=1e-5)


@EACH
def test_hooks_that_would_not_be_run_are_refused(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    outer = [model]
    if case.host == "TransformerBridge":
        outer.append(model.original_model.get_encoder())
    else:
        outer.append(model.embed)  # the decoder's too, which a plain model runs
    for module in outer:
        handle = module.register_forward_hook(lambda module, args, output: output)
        with pytest.raises(cm.UnsupportedModel, match="hooks on the"):
            cm.decoder_lens(model, given.tokens, max_new_tokens=2)
        handle.remove()
    if case.host == "HookedEncoderDecoder":
        ask = functools.partial(cm.decoder_lens, model, given.tokens, mode="scores", target=[7])
        with model.hooks(fwd_hooks=[("hook_embed", double)]):  # the encoder's alone
            edited = ask()
        assert not torch.allclose(edited.logits, ask().logits)


# T5 whose readout is not scaled


def test_an_mt5_has_no_scale_before_its_unembedding() -> None:
    if zoo.major() < 4:
        pytest.skip("no bridge of T5")
    make = functools.partial(
        zoo_build.hugging_face,
        "MT5ForConditionalGeneration",
        "MT5Config",
        {**zoo_configs.T5_LIKE, "tie_word_embeddings": False},
        dtype=torch.float64,
        seed=0,
    )
    with zoo_build.quiet():
        model = zoo_build.bridge(make(), "t5", dtype=torch.float64, processed=False).eval()
    t5 = case_of("t5")
    assert view_of(model).readout.scale == 1
    assert view_of(zoo.build(t5)).readout.scale == zoo_configs.D_MODEL**-0.5
    given = zoo.inputs(t5)
    found = cm.decoder_lens(
        model,
        given.tokens,
        mode="scores",
        target=[7, 9],
        decoder_input=given.decoder_tokens,
    )
    spoken = cm.decoder_lens(model, given.tokens, max_new_tokens=LENGTH)
    assert given.decoder_tokens is not None
    for layer in found.layers:
        short = oracle.truncated(make(), layer)
        right = oracle.logits(short, given.tokens, given.decoder_tokens)[:, -1, [7, 9]]
        torch.testing.assert_close(found.logits[:, layer], right, rtol=1e-5, atol=1e-5)
        answers = oracle.said(short, given.tokens, max_new_tokens=LENGTH).tolist()
        for answer, one in zip(answers, outputs(spoken, layer), strict=True):
            assert answer[: len(one)] == one
