"""Whisper, wav2vec2 and HuBERT through a view: frames are tokens; against raw hooks on them."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
import zoo_build
import zoo_others
from asked import EXACT, relative
from test_decoder_lens_speech import features, whisper
from torch import Tensor
from zoo_refused import _SPEECH

import tl_contextmix as cm
from tl_contextmix.errors import ContextMixError
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.results import ContextMap

pytestmark = pytest.mark.newest
DECODER = torch.tensor([[1, 5, 6, 7]] * 3)
SIZES = {**_SPEECH, "conv_stride": (20, 16), "conv_kernel": (10, 3)}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2Model", {}),
    "wav2vec2 with a head": (
        "Wav2Vec2ForCTC",
        {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    ),
    "wav2vec2 with an adapter": ("Wav2Vec2Model", {"add_adapter": True}),
    "HuBERT": ("HubertForCTC", {}),
    "Whisper": ("WhisperForConditionalGeneration", {}),
}


@functools.cache
def model(kind: str) -> Any:
    """A random model; no test changes it."""
    name, options = KINDS[kind]
    if kind == "Whisper":
        return whisper()
    return made(name, **options)


def made(name: str, **options: Any) -> Any:
    config = f"{name.split('Model')[0].split('For')[0]}Config"
    return zoo_build.hugging_face(name, config, {**SIZES, **options}, dtype=torch.float64, seed=0)


def sound(kind: str) -> Tensor:
    if kind == "Whisper":
        return features()
    return torch.randn(3, 2400, generator=torch.Generator().manual_seed(0)).double()


def asked(kind: str, stack: str) -> dict[str, Any]:
    return {"decoder_input": DECODER, "stack": stack} if kind == "Whisper" else {}


def run(hf: Any, kind: str, **options: Any) -> Any:
    decoder = {"decoder_input_ids": DECODER} if kind == "Whisper" else {}
    with torch.no_grad():
        return hf(sound(kind), **decoder, **options)


def layers_of(hf: Any, side: str) -> Any:
    base = getattr(hf, hf.base_model_prefix, hf)
    return getattr(base, side)


def outputs(hf: Any, kind: str, side: str) -> list[Tensor]:
    """What each block of a stack writes."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in layers_of(hf, side).layers]
    run(hf, kind)
    for handle in handles:
        handle.remove()
    return seen


def behind(hf: Any, side: str, layer: int) -> Any:
    """The model's own norm behind the last block."""
    stack = layers_of(hf, side)
    last = layer == len(stack.layers) - 1
    normed = any(word in type(stack).__name__ for word in ("Stable", "Whisper"))
    return stack.layer_norm if last and normed else torch.nn.Identity()


EACH = [(kind, "encoder") for kind in KINDS] + [("Whisper", "decoder"), ("Whisper", "cross")]


@pytest.mark.parametrize(("kind", "stack"), EACH)
def test_zeroed_values_are_those_of_the_model_itself(kind: str, stack: str) -> None:
    hf = model(kind)
    assert cm.check(hf).ok
    found = cm.value_zeroing(hf, sound(kind), **asked(kind, stack)).scores[:, :, 0]
    side = "decoder" if stack == "cross" else stack
    name = "encoder_attn" if stack == "cross" else "self_attn" if kind == "Whisper" else "attention"
    blocks = layers_of(hf, side).layers
    for layer, block in enumerate(blocks):
        norm = behind(hf, side, layer)
        whole = norm(outputs(hf, kind, side)[layer])
        for source in range(found.shape[-1]):

            def zero(module: Any, args: Any, out: Tensor, source: int = source) -> Tensor:
                return out.index_fill(1, torch.tensor(source), 0)

            handle = getattr(block, name).v_proj.register_forward_hook(zero)
            changed = norm(outputs(hf, kind, side)[layer])
            handle.remove()
            expected = 1 - torch.cosine_similarity(changed, whole, dim=-1).detach()
            assert float((found[:, layer, :, source] - expected).abs().max()) < 1e-10
    assert float(found.max()) > 1e-4


@pytest.mark.parametrize(("kind", "stack"), EACH)
def test_parts_add_up_to_the_model_s_own_states(kind: str, stack: str) -> None:
    hf = model(kind)
    parts = cm.decompose(hf, sound(kind), at="block_out", **asked(kind, stack)).total()
    side = "decoder" if stack == "cross" else stack
    # Convolutions leave Whisper's stream with its axes in another order in memory.
    assert relative(parts, torch.stack(outputs(hf, kind, side), 1)) < EXACT
    if stack != "cross":
        whole = decompx_vectors(hf, sound(kind), **asked(kind, stack)).total()
        assert relative(whole[:, -1], outputs(hf, kind, side)[-1]) < EXACT
    norms = cm.attention_norms(hf, sound(kind), at="attn_out", **asked(kind, stack))
    assert norms.source.strings[0][:3] != norms.target.strings[0][:3] or stack != "cross"
    if stack != "decoder":
        assert norms.source.strings[0][:3] == ("0.00", "0.02", "0.04")
    patterns = cm.attention(hf, sound(kind), **asked(kind, stack)).scores
    own = run(hf, kind, output_attentions=True)
    named = {"encoder": "encoder_attentions", "decoder": "decoder_attentions"}
    own = own[named.get(stack, "cross_attentions")] if kind == "Whisper" else own.attentions
    assert relative(patterns, torch.stack(own, 1)) < EXACT


@pytest.mark.parametrize(("kind", "stack"), EACH)
def test_why_a_head_looks_there_adds_up_to_its_score(kind: str, stack: str) -> None:
    hf = model(kind)
    options = {
        name: one if name == "stack" else one[:1] for name, one in asked(kind, stack).items()
    }
    found = cm.query_contributions(hf, sound(kind)[:1], edge=(1, 1, 3, 2), **options)
    name = "encoder_attn" if stack == "cross" else "self_attn" if kind == "Whisper" else "attention"
    attention = getattr(
        layers_of(hf, "encoder" if stack == "encoder" else "decoder").layers[1], name
    )
    seen: list[Tensor] = []
    for part in (attention.q_proj, attention.k_proj):
        handle = part.register_forward_hook(lambda module, args, out: seen.append(out))
        run(hf, kind)
        handle.remove()
    query, key = (x[0, at].unflatten(-1, (4, 8))[1] for x, at in zip(seen, (3, 2), strict=True))
    assert float(found.scores.sum()) == pytest.approx(float(query @ key) * 8**-0.5, abs=1e-9)


def test_whisper_s_words_are_explained() -> None:
    hf = model("Whisper")
    scores = cm.log_prob_contributions(hf, features(), target=9, decoder_input=DECODER)
    said = run(hf, "Whisper").logits[:, -1].log_softmax(-1)[:, 9]
    assert relative(scores.trajectory[:, -1], said) < EXACT
    cut = cm.knockout(hf, features(), target=9, heads=[(0, 1)], decoder_input=DECODER, controls=0)
    projection = hf.get_decoder().layers[0].self_attn.out_proj
    handle = projection.register_forward_pre_hook(
        lambda module, args: args[0].index_fill(-1, torch.arange(8, 16), 0)
    )
    without = run(hf, "Whisper").logits[:, -1].log_softmax(-1)[:, 9]
    handle.remove()
    everywhere = cm.knockout(
        hf,
        features(),
        target=9,
        heads=[(0, 1)],
        decoder_input=DECODER,
        controls=0,
        everywhere=True,
    )
    assert relative(everywhere.after[:, 0], without) < EXACT
    assert not torch.equal(cut.after, cut.before)
    memories = cm.ff_memories(hf, features(), decoder_input=DECODER)
    assert torch.equal(memories.final_top, run(hf, "Whisper").logits.argmax(-1))
    # Fused attention is made eager for a pass, and is what it was.
    fused = made_whisper()
    kept = fused.config._attn_implementation
    plain = cm.attention(fused, features(), stack="encoder")
    assert fused.config._attn_implementation == kept == "sdpa"
    assert relative(plain.scores, cm.attention(hf, features(), stack="encoder").scores) < EXACT


def made_whisper() -> Any:
    fused = zoo_others.whisper()
    fused.set_attn_implementation("sdpa")
    return fused


@pytest.mark.parametrize("kind", ["wav2vec2 with a head", "HuBERT"])
def test_symbols_of_a_ctc_head_are_targets_at_a_frame(kind: str) -> None:
    hf = model(kind)
    assert "readout(last residual) = logits" in {row.identity for row in cm.check(hf).rows}
    said = run(hf, kind).logits.log_softmax(dim=-1)
    asked: dict[str, Any] = {"target": 9, "pos": 3}
    layers = cm.log_prob_contributions(hf, sound(kind), **asked)
    assert relative(layers.trajectory[:, -1], said[:, 3, 9]) < EXACT
    contrast = cm.log_prob_contributions(hf, sound(kind), foil=12, **asked)
    head = hf.lm_head
    apart = head.bias[9] - head.bias[12]
    if kind != "HuBERT":  # whose last norm is in its last block
        apart = apart + (head.weight[9] - head.weight[12]) @ behind(hf, "encoder", 1).bias
    summed = contrast.scores.nansum(dim=-1) + apart.detach()
    assert relative(summed, said[:, 3, 9] - said[:, 3, 12]) < EXACT
    memories = cm.ff_memories(hf, sound(kind))
    assert torch.equal(memories.final_top, said.argmax(dim=-1))
    graph = cm.flow(hf, sound(kind)[:1], foil=12, **asked)
    assert graph.score == pytest.approx(float(said[0, 3, 9] - said[0, 3, 12]), abs=1e-9)
    cut = cm.knockout(hf, sound(kind), heads=[(0, 1)], controls=0, everywhere=True, **asked)
    block = layers_of(hf, "encoder").layers[0].attention.out_proj
    width = block.in_features // 4

    def ablate(module: Any, args: Any) -> Any:
        heads = args[0].clone()
        heads[..., width : 2 * width] = 0
        return (heads,)

    handle = block.register_forward_pre_hook(ablate)
    without = run(hf, kind).logits.log_softmax(dim=-1)[:, 3, 9]
    handle.remove()
    assert relative(cut.after[:, 0], without) < EXACT
    rows, every = cm.value_zeroing(hf, sound(kind), **asked), cm.value_zeroing(hf, sound(kind))
    assert relative(rows.scores[:, :, :, 0], every.scores[:, :, :, 3]) < EXACT


def test_frames_are_joined_to_words_by_their_times() -> None:
    found = cm.value_zeroing(model("HuBERT"), sound("HuBERT")[:1]).normalize()
    frames = found.scores[0, 0, 0]
    times = [(0.0, 0.05), (0.05, 0.1), (0.1, 0.101)]
    words = found.words(times, per_second=50)
    assert words.scores.shape[-2:] == (3, 3)
    # Frames 0 and 1, 2 to 4, and one at least.
    for row, rows in enumerate((slice(0, 2), slice(2, 5), slice(5, 6))):
        for column, columns in enumerate((slice(0, 2), slice(2, 5), slice(5, 6))):
            expected = frames[rows, columns].sum(-1).mean()
            assert torch.allclose(words.scores[0, 0, 0, row, column], expected)
    heard = cm.attention_norms(
        model("Whisper"), features(), at="attn_out", stack="cross", decoder_input=DECODER
    )
    grouped = heard.by_span([(0.0, 0.1)], per_second=50)
    assert torch.allclose(grouped.scores[..., 0], heard.scores[..., :5].sum(-1))
    ask: Any = inspect.unwrap(ContextMap.words)
    for wrong in ("sentences", [(0.1, 0.0)], [(-1.0, 1.0)], [], 5):
        with pytest.raises(cm.InvalidInput):
            ask(found, wrong, per_second=50)
    with pytest.raises(cm.InvalidInput, match="no times"):
        found.words(times, per_second=0.0)
    # Of 0.17 seconds the convolutions make no frame of the end.
    whole = found.words([(0.0, 0.1), (0.1, 0.17)], per_second=50)
    assert torch.equal(whole.scores, found.words([(0, 5), (5, 8)]).scores)
    last = found.words([(0.0, 0.155), (0.155, 0.16)], per_second=50)  # within the last frame
    assert torch.equal(last.scores, found.words([(0, 8), (7, 8)]).scores)
    for beyond in [(0.1, 0.2), (0.16, 0.18)]:
        with pytest.raises(cm.InvalidInput, match="beyond the sound.*up to 0.16 seconds"):
            found.words([beyond], per_second=50)


def test_what_a_model_of_sound_does_not_answer_is_refused_by_name() -> None:
    hf = made_whisper()
    options: dict[str, Any] = {"target": 9, "decoder_input": DECODER}
    asks: list[tuple[Any, str]] = [
        (lambda: cm.gradient_x_input(hf, features(), **options), "gradients"),
        (lambda: cm.integrated_gradients(hf, features(), **options), "gradients"),
        (
            lambda: cm.attention_knockout(hf, features(), sources=[0], pos=-1, **options),
            "attention pattern|frames|source",
        ),
        (lambda: cm.log_prob_contributions(made("HubertModel"), sound(""), target=9), "readout"),
    ]
    for ask, match in asks:
        with pytest.raises(ContextMixError, match=match):
            ask()
    for wrong in ("a text", torch.zeros(1, 8, 23), torch.zeros(8, 24), torch.tensor([[1, 2]])):
        with pytest.raises(cm.InvalidInput, match="cannot hear this.*got"):
            cm.value_zeroing(hf, wrong)
    with pytest.raises(cm.InvalidInput, match="no meaning for a model of sound"):
        cm.value_zeroing(hf, features(), attention_mask=torch.ones(3, 12))
    with pytest.raises(cm.InvalidInput, match="cannot hear"):
        cm.value_zeroing(made("HubertModel"), torch.zeros(1, 5))
    with pytest.raises(cm.UnsupportedModel, match="that predicts tokens: got a WhisperModel"):
        cm.decoder_lens(hf.model, features())
    wavlm = made("WavLMModel")
    with pytest.raises(cm.UnsupportedModel, match="not a TransformerLens model"):
        cm.value_zeroing(wavlm, sound(""))
    padded = {"input_values": sound(""), "attention_mask": torch.tensor([[1] * 9 + [0]] * 3)}
    with pytest.raises(cm.InvalidInput, match="got 3 of 3 with zeros in attention_mask"):
        cm.value_zeroing(made("HubertModel"), padded)
    handle = hf.get_encoder().layers[0].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(cm.UnsupportedModel, match="hooks on a Hugging Face model"):
        cm.value_zeroing(hf, features())
    handle.remove()
    with pytest.raises(cm.InvalidInput, match="train mode"):
        cm.value_zeroing(made("HubertModel").train(), sound(""))


def test_a_view_keeps_no_model_alive_and_sees_changed_weights() -> None:
    hf = made("HubertModel")
    before = cm.value_zeroing(hf, sound(""))
    assert isinstance(before, ContextMap)
    again = {"input_values": [*sound("").numpy()]}
    assert torch.equal(cm.value_zeroing(hf, again).scores, before.scores)
    assert (
        before.provenance.options["input_values"]
        != cm.value_zeroing(hf, 2 * sound("")).provenance.options["input_values"]
    )
    with torch.no_grad():
        hf.encoder.layers[0].attention.v_proj.weight.mul_(2)
    assert not torch.equal(cm.value_zeroing(hf, sound("")).scores, before.scores)
    gone = weakref.ref(hf)
    del hf
    gc.collect()
    assert gone() is None
