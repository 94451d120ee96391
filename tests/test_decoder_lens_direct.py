"""DecoderLens of Hugging Face's own encoder-decoders, against truncated ones."""

from __future__ import annotations

import functools
from typing import Any

import oracle_decoding as oracle
import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import words
from torch import Tensor

import tl_contextmix as cm

pytestmark = pytest.mark.newest

LENGTH = 6
TEXTS = ["the cat sat on the mat", "a dog"]
# Softmax or routing in single precision, but for what has to be: its masks overflow above it.
_DTYPES = {"ProphetNet": torch.float32}
BRIDGED = ("LED", "LongT5", "SwitchTransformers")


@functools.cache
def model(kind: str) -> Any:
    """A random model that ends some of its answers; no test changes it."""
    found = zoo_others.direct(kind, dtype=_DTYPES.get(kind, torch.float64))
    with zoo_build.quiet():
        said = oracle.said(found, words(7), max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    found.generation_config.eos_token_id = int(said[0, 3])
    return found


@functools.cache
def tokenizer() -> Any:
    return zoo_build.load_tokenizer("bart")


def step_by_step(short: Any, tokens: Tensor, decoder_tokens: Tensor) -> Tensor:
    """Logits of a decoder that is given one token after the other, as it generates."""
    cache = oracle.cache()
    with torch.no_grad():
        return torch.cat(
            [
                short(tokens, decoder_input_ids=one, past_key_values=cache, use_cache=True).logits
                for one in decoder_tokens.split(1, dim=1)
            ],
            dim=1,
        )


@pytest.mark.parametrize("kind", zoo_others.DIRECT)
def test_every_layer_says_and_thinks_what_the_model_without_later_blocks_does(kind: str) -> None:
    whole, tokens = model(kind), words(7)
    exact = 1e-5 if whole.dtype == torch.float32 else 1e-6
    beams = 2 if kind in ("LED", "T5Gemma") else 1
    with zoo_build.quiet():
        found = cm.decoder_lens(whole, tokens, max_new_tokens=LENGTH, num_beams=beams)
        judged = cm.decoder_lens(whole, TEXTS, ["a dog ran", "the cat"], **forced())
        bare = cm.decoder_lens(whole, tokens, mode="scores", target=[7, 9], final_norm=False)
    assert found.layers == (0, 1, 2, 3)
    assert (found.provenance.host, found.provenance.model) == (type(whole).__name__,) * 2
    labels, mask = judged.target.ids, judged.target.mask
    inputs = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1]], dim=1)
    logits = step_by_step if kind == "ProphetNet" else oracle.logits
    for layer in found.layers:
        short = oracle.truncated(whole, layer)
        options = {"max_new_tokens": LENGTH, "num_beams": beams}
        with zoo_build.quiet():
            expected = oracle.said(short, tokens, **options).tolist()
        for row in range(2):
            said = found.ids[row, layer][found.mask[row, layer]].tolist()
            assert said == expected[row][: len(said)]
            assert bool(found.finished[row, layer]) == (said[-1] in end_of(whole))
            ids = tokenizer()(TEXTS[row], return_tensors="pt")["input_ids"]
            seen = {"attention_mask": torch.ones_like(ids)} if kind == "T5Gemma" else {}
            right = logits(short, ids, inputs[row : row + 1], **seen)[0].log_softmax(-1)
            gold = right.gather(-1, labels[row][:, None])[mask[row], 0]
            assert float((judged.log_probs[row, layer][mask[row]] - gold).abs().max()) <= exact
            alone = oracle.truncated(whole, layer, norm=False)
            start = torch.tensor([[2]])
            right = oracle.logits(alone, tokens[row : row + 1], start)[0, -1, [7, 9]]
            assert float((bare.logits[row, layer] - right).abs().max()) <= exact
    assert len({*found.texts[0]}) > 1 or float(judged.kl.max()) > 1e-3, "layers differ"


def forced() -> Any:
    return {"mode": "teacher_forced", "tokenizer": tokenizer()}


def end_of(whole: Any) -> list[int]:
    return [whole.generation_config.eos_token_id]


@pytest.mark.parametrize("kind", BRIDGED)
def test_a_bridge_that_shows_too_little_for_maps_is_read_directly(kind: str) -> None:
    ask = functools.partial(cm.decoder_lens, input=TEXTS, max_new_tokens=LENGTH)
    with zoo_build.quiet():
        plain = ask(zoo_others.direct(kind), tokenizer=tokenizer())
        hf = zoo_others.direct(kind)
        bridge = zoo_build.bridge(hf, "bart", dtype=torch.float64, processed=False)
        found = ask(bridge)
    assert torch.equal(found.ids, plain.ids)
    assert torch.allclose(found.log_probs, plain.log_probs)
    assert found.texts == plain.texts
    with pytest.raises(cm.InvalidInput, match="tokenizer would change nothing"):
        ask(bridge, tokenizer=tokenizer())
    bridge.original_model.generation_config.suppress_tokens = [int(plain.ids[0, -1, 0])]
    with zoo_build.quiet():
        assert int(ask(bridge).ids[0, -1, 0]) != int(plain.ids[0, -1, 0])
    bridge.original_model.generation_config.suppress_tokens = None
    # Its hooks would not be seen by what decodes.
    block = bridge.encoder_blocks[0].hook_out
    hooked = bridge.hooks(fwd_hooks=[(block.name, lambda tensor, hook: 0 * tensor)])
    with hooked, pytest.raises(cm.UnsupportedModel):
        ask(bridge)
    with torch.no_grad():
        for name, weight in bridge.original_model.named_parameters():
            weight.mul_(1.5 if "encoder" in name else 1)
    with zoo_build.quiet():
        assert not torch.allclose(ask(bridge).log_probs, plain.log_probs)


def test_global_attention_is_followed_and_cut_with_the_padding() -> None:
    led = model("LED")
    whole = torch.zeros(2, 8, dtype=torch.long)
    whole[:, 0] = 1
    encoded = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with zoo_build.quiet():
        plain = cm.decoder_lens(led, dict(encoded), mode="scores", target=[7, 9])
        asked = {**encoded, "global_attention_mask": whole[:, : encoded["input_ids"].shape[1]]}
        found = cm.decoder_lens(led, asked, mode="scores", target=[7, 9], max_bytes=1)
        assert torch.allclose(found.logits[:, 0], plain.logits[:, 0]), "embeddings come before it"
        assert not torch.allclose(found.logits[:, 1], plain.logits[:, 1])
        for row, layer in ((0, 3), (1, 1)):
            one = tokenizer()(TEXTS[row], return_tensors="pt")
            first = whole[:1, : one["input_ids"].shape[1]]
            expected = oracle.logits(
                oracle.truncated(led, layer),
                one["input_ids"],
                torch.tensor([[2]]),
                global_attention_mask=first,
            )
            assert torch.allclose(found.logits[row, layer], expected[0, -1, [7, 9]])
    t5 = model("UMT5")
    with pytest.raises(cm.InvalidInput, match="takes no global_attention_mask"):
        cm.decoder_lens(t5, asked, mode="scores", target=[7, 9])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"moe_eval_capacity_token_fraction": 0.5}, "leave tokens out"),
        ({"second_expert_policy": "random"}, "second expert at random"),
    ],
)
def test_experts_that_depend_on_other_rows_or_on_chance_are_refused(
    options: dict[str, Any], match: str
) -> None:
    with pytest.raises(cm.UnsupportedModel, match=match):
        cm.decoder_lens(zoo_others.direct("NllbMoe", **options), words(7))


def test_hooks_take_part_and_what_does_not_fit_is_refused() -> None:
    t5 = model("UMT5")
    ask: Any = functools.partial(cm.decoder_lens, t5, mode="scores", target=[7, 9])
    plain = ask(words(7))
    block = t5.get_encoder().block[0]
    handle = block.register_forward_hook(lambda module, args, out: out + out[..., :1])
    edited = ask(words(7))
    handle.remove()
    assert torch.equal(edited.logits[:, 0], plain.logits[:, 0])
    assert not torch.allclose(edited.logits[:, 1], plain.logits[:, 1])
    for outer in (t5, t5.get_encoder()):
        handle = outer.register_forward_hook(lambda module, args, out: out)
        with pytest.raises(cm.UnsupportedModel, match="have no effect"):
            ask(words(7))
        handle.remove()
    with pytest.raises(cm.InvalidInput, match="without a tokenizer"):
        ask("the cat")
    with pytest.raises(cm.InvalidInput, match="train mode"):
        ask(words(7)) if t5.train() else None
    t5.eval()
    for maps in (cm.attention_norms, cm.check):
        with pytest.raises(cm.UnsupportedModel, match="not a TransformerLens model"):
            maps(t5, *([words(7)] if maps is cm.attention_norms else []))
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    sizes |= {"src_vocab_size": 61, "tgt_vocab_size": 61, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"langs": ["en", "de"], "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    names = ("FSMTForConditionalGeneration", "FSMTConfig")
    turned = zoo_build.hugging_face(*names, sizes, dtype=torch.float32, seed=0)
    with pytest.raises(cm.UnsupportedModel, match="cannot run the decoder of a FSMT"):
        cm.decoder_lens(turned, words(7))
    long = torch.full((1, 65), 7)
    with pytest.raises(cm.InvalidInput, match="at most 64"):
        cm.decoder_lens(model("PegasusX"), long, mode="scores", target=[7])


@pytest.mark.every
def test_t5_is_read_on_every_version_of_transformer_lens() -> None:
    """No class of TransformerLens 2 runs T5 right; Hugging Face's does."""
    t5 = zoo.hf_model("t5")
    with zoo_build.quiet():
        found = cm.decoder_lens(
            t5, TEXTS, max_new_tokens=LENGTH, tokenizer=zoo_build.load_tokenizer("t5")
        )
    for layer in found.layers:
        ids = zoo_build.load_tokenizer("t5")(TEXTS[0], return_tensors="pt")["input_ids"]
        expected = oracle.said(oracle.truncated(t5, layer), ids, max_new_tokens=LENGTH)
        said = found.ids[0, layer][found.mask[0, layer]].tolist()
        assert said == expected[0].tolist()[: len(said)]
