"""DecoderLens of a Hugging Face speech model: audio features in, a transcript per layer out."""

from __future__ import annotations

import functools
from typing import Any

import oracle_decoding as oracle
import pytest
import torch
import zoo_build
import zoo_others
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.encoder_decoder.generation_config import _OF_SOURCE_TOKENS

LENGTH, PAD = 8, 60


@functools.cache
def whisper() -> Any:
    """A tiny random Whisper that ends some of its answers."""
    model = zoo_others.whisper()
    said = generate(model, features(), min_new_tokens=LENGTH)
    model.generation_config.eos_token_id = int(said[0, 3])
    return model


def features() -> Tensor:
    return torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)).double()


@torch.no_grad()
def generate(model: Any, given: Tensor, **options: Any) -> Tensor:
    with zoo_build.quiet():
        return model.generate(given, max_new_tokens=LENGTH, do_sample=False, **options)


@pytest.mark.parametrize("beams", [1, 3])
def test_every_layer_says_what_whisper_without_later_blocks_says(beams: int) -> None:
    model = whisper()
    found = cm.decoder_lens(model, features(), max_new_tokens=LENGTH, num_beams=beams)
    assert found.layers == (0, 1, 2, 3)
    end = model.generation_config.eos_token_id
    for layer in found.layers:
        short = oracle.truncated(model, layer)
        expected = generate(short, features(), num_beams=beams).tolist()
        for row in range(3):
            said = found.ids[row, layer][found.mask[row, layer]].tolist()
            # Whisper takes the end token off, and fills up with padding.
            right = [token for token in expected[row] if token not in (end, PAD)]
            assert [token for token in said if token != end] == right
            assert bool(found.finished[row, layer]) == (said[-1] == end)
            inputs = torch.tensor([[1, *said[:-1]]])
            with torch.no_grad():
                logits = short(features()[row : row + 1], decoder_input_ids=inputs).logits
            log_probs = logits[0].log_softmax(-1)[torch.arange(len(said)), said]
            torch.testing.assert_close(found.log_probs[row, layer, : len(said)], log_probs)
    assert found.texts[0][3] == " ".join(
        str(t) for t in found.ids[0, 3][found.content[0, 3]].tolist()
    )
    assert bool(found.finished.any())


def test_its_own_output_is_judged_and_tokens_are_scored() -> None:
    model = whisper()
    found = cm.decoder_lens(model, features(), mode="teacher_forced", max_new_tokens=LENGTH)
    assert not bool(found.ranks[:, -1].any())
    assert float(found.kl[:, 0].max()) > 0.01
    scores = cm.decoder_lens(model, features(), mode="scores", target=[7, 9])
    short = oracle.truncated(model, 1)
    with torch.no_grad():
        expected = short(features(), decoder_input_ids=torch.full((3, 1), 1)).logits[:, 0, [7, 9]]
    torch.testing.assert_close(scores.logits[:, 1], expected)
    # What a feature extractor returns; a mask over features is of no use to Whisper's encoder.
    given: Any = {"input_features": [*features().numpy()], "attention_mask": torch.zeros(3, 24)}
    assert scores.equals(cm.decoder_lens(model, given, mode="scores", target=[7, 9]))
    bare = cm.decoder_lens(model, features(), mode="scores", target=[7, 9], final_norm=False)
    assert bool((bare.logits != scores.logits).all()), "Whisper's encoder has a final norm"


def test_metrics_and_a_tokenizer_of_the_users() -> None:
    tokenizer = zoo_build.load_tokenizer("bart")
    found = cm.decoder_lens(
        whisper(), features(), ["the cat"] * 3, max_new_tokens=LENGTH, tokenizer=tokenizer
    )
    words = tokenizer.decode(found.ids[0, 3][found.content[0, 3]], skip_special_tokens=True)
    assert found.texts[0][3] == words
    rates = found.metrics(metric="WER")
    assert len(rates.points) == 4
    judged = cm.decoder_lens(
        whisper(), features(), ["the cat"] * 3, mode="teacher_forced", tokenizer=tokenizer
    )
    assert judged.target.ids.tolist()[0][-1] == tokenizer.eos_token_id


AUDIO = torch.zeros(1, 8, 24)
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"input": "a text"}, "cannot read"),
    ({"input": torch.zeros(8, 24)}, "cannot read"),
    ({"input": AUDIO.long()}, "cannot read"),
    ({"input": AUDIO[:0]}, "at least one input"),
    ({"input": torch.zeros(1, 8, 5)}, "cannot encode the audio"),
    ({"input": torch.zeros(1, 8, 0)}, "cannot encode the audio"),
    ({"input": torch.zeros(1, 5, 24)}, "8 mel bins"),
    ({"decoder_input": torch.tensor([[1], [1]])}, r"shape \[1, pos\]"),
    ({"decoder_input": torch.tensor([[61]])}, "ids from 0 to 60"),
    ({"decoder_input": "a"}, "tokenizer"),
    ({"attention_mask": torch.ones(1, 24)}, "no meaning"),
    ({"padding_side": "left"}, "no meaning"),
    ({"references": "a", "mode": "teacher_forced"}, "tokenizer"),
    # Token ids as numbers are no words to compare a transcript with.
    ({"references": "a", "metric": "WER"}, "tokenizer"),
    ({"mode": "scores", "target": ["a"]}, "tokenizer"),
    ({"tokenizer": 5}, "not a tokenizer"),
]


@pytest.mark.parametrize(("options", "match"), UNFIT)
def test_what_does_not_fit_is_refused(options: dict[str, Any], match: str) -> None:
    lens: Any = cm.decoder_lens
    with pytest.raises(cm.InvalidInput, match=match):
        lens(whisper(), **{"input": AUDIO, **options})


def test_other_speech_models_are_refused() -> None:
    sizes = {"input_feat_per_channel": 8, "conv_channels": 16, "d_model": 32, "vocab_size": 61}
    model = zoo_build.hugging_face(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        sizes,
        dtype=torch.float64,
        seed=0,
    )
    with pytest.raises(cm.UnsupportedModel):
        cm.decoder_lens(model, AUDIO)


@pytest.mark.parametrize(
    "rate", ["dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"]
)
def test_a_model_that_drops_activations_is_refused(rate: str) -> None:
    model = zoo_others.whisper(**{rate: 0.1}).train()
    with pytest.raises(cm.InvalidInput, match=r"in train mode.*model.eval\(\)"):
        cm.decoder_lens(model, features())
    cm.decoder_lens(model.eval(), features(), mode="scores", target=[7])


def test_hooks_and_settings_are_followed_or_refused() -> None:
    model = whisper()
    ask = functools.partial(cm.decoder_lens, model, features(), mode="scores", target=[7, 9])
    plain = ask()
    encoder, settings = model.get_encoder(), model.generation_config
    handle = encoder.layer_norm.register_forward_hook(lambda module, args, output: 2 * output)
    edited = ask()
    with torch.no_grad():
        right = model(features(), decoder_input_ids=torch.full((3, 1), 1)).logits[:, 0, [7, 9]]
    handle.remove()
    torch.testing.assert_close(edited.logits[:, -1], right)
    assert bool((edited.logits != plain.logits).all())
    handle = encoder.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(cm.UnsupportedModel, match="its whole encoder have no effect"):
        ask()
    handle.remove()
    before = dict(vars(settings))
    for name in ("num_return_sequences", "guidance_scale", *_OF_SOURCE_TOKENS):
        setattr(settings, name, 2)
        with pytest.raises(cm.UnsupportedModel, match=f"{name}=2"):
            ask()
        setattr(settings, name, before.get(name))
    settings.repetition_penalty = 5.0
    found = cm.decoder_lens(model, features(), layer=1, max_new_tokens=LENGTH)
    expected = generate(oracle.truncated(model, 1), features()).tolist()
    settings.repetition_penalty = before["repetition_penalty"]
    for row in range(3):
        said = found.ids[row, 0][found.content[row, 0]].tolist()
        assert said == [token for token in expected[row] if token != PAD][: len(said)]
    assert not found.equals(cm.decoder_lens(model, features(), layer=1, max_new_tokens=LENGTH))
