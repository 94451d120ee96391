"""Views of Hugging Face models of sound: Whisper, wav2vec2 and HuBERT, whose tokens are frames.

TransformerLens has no class for Whisper, and its bridges of the others show no neurons. All three
have one kind of block, whose activations are read at the model's own modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.attention_weights import unmerged
from tl_contextmix.adapters.handles import Handle, adapters_apart
from tl_contextmix.adapters.inputs.activation_cache import describe
from tl_contextmix.adapters.inputs.tokens import sound_of
from tl_contextmix.adapters.running import without_hooks
from tl_contextmix.adapters.speech_passes import head_of, refused, run_speech, stacks_of
from tl_contextmix.adapters.tokenizers import make_to_string
from tl_contextmix.adapters.unbridged import Unbridged
from tl_contextmix.adapters.verification import (
    IdentityReport,
    check_rows,
    readout_row,
    run_probe,
    settle_block,
)
from tl_contextmix.core.blocks import AttentionSublayer, Batch, Block, FeedForward, Side, Weights
from tl_contextmix.core.model_view import ModelView, Readout
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.errors import InvalidInput, UnsupportedModel, four_parts

_FAMILIES = ("whisper", "wav2vec2", "hubert")
# How the modules of a block are called, Whisper's and those of wav2vec2 and HuBERT: attention with
# its kind and its norm, and the layers of neurons.
_ATTENTIONS: dict[str, tuple[Any, str]] = {
    "self_attn": ("self", "self_attn_layer_norm"),
    "attention": ("self", "layer_norm"),
    "encoder_attn": ("cross", "encoder_attn_layer_norm"),
}
_NEURONS = (
    ("fc1", "fc2"),
    ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
)
_RATE = 16_000  # samples a second that all of these models were trained on
_HOP = 160  # samples between Whisper's mel frames


def is_sound(model: object) -> bool:
    """Whether a model is a Hugging Face one of sound, of a family that is read here.

    Others mix frames in ways of their own, or count them otherwise (Speech2Text, WavLM).
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    known = isinstance(model, nn.Module) and not hasattr(model, "original_model")
    heard = getattr(model, "main_input_name", "") in ("input_features", "input_values")
    return known and heard and family in _FAMILIES and bool(stacks_of(model))


def build_speech(model: Any, weights: Mapping[str, Tensor]) -> tuple[ModelView, IdentityReport]:
    """Returns the view of a model of sound, and how well it reproduces the model.

    Raises:
        UnsupportedModel: If a block is another than of attention and a feed-forward layer.
    """
    host, view = _unsettled(model, weights)
    with without_hooks(model):
        probe = run_probe(view)
        stacks = {}
        for name, blocks in view.stacks.items():
            following = [block.resid_in for block in blocks[1:]] + [blocks[-1].resid_out]
            stacks[name] = tuple(
                settle_block(_placements(host, view, name, block), probe, after, None)[0]
                for block, after in zip(blocks, following, strict=True)
            )
        view = replace(view, stacks=stacks)
        rows = [*check_rows(view, probe)]
        if not view.readout.refusal:
            rows.append(readout_row(view, probe))
    limits = (view.readout.refusal,) if view.readout.refusal else ()
    return view, IdentityReport(f"{view.name} ({view.host})", tuple(rows), limits=limits, cause="")


def _unsettled(model: Any, weights: Mapping[str, Tensor]) -> tuple[Unbridged, ModelView]:
    d_vocab = int(getattr(model.config, "vocab_size", 0))
    strides = getattr(model.config, "conv_stride", (2, _HOP))
    seconds = prod(strides) / _RATE  # that a frame lasts which blocks see
    pair = "decoder" in stacks_of(model)
    host = Unbridged(model, d_vocab, pair, lambda model: getattr(model, "tokenizer", None))
    points: dict[str, tuple[str, str, str]] = {}
    stacks = {
        side: tuple(_block(host, side, layer, points) for layer in range(len(module.layers)))
        for side, module in sorted(stacks_of(model).items(), reverse=True)
    }
    to_token = make_to_string(host.handle)

    def to_string(token: int) -> str:
        return to_token(token) if token < d_vocab else f"{(token - d_vocab) * seconds:.2f}"

    return host, host.view(
        weights,
        stacks=stacks,
        readout=_readout(host),
        final_norms=_final_norms(model, host.handle),
        n_ctx=getattr(model.config, "max_target_positions", None),
        limits=(),
        takes={},
        runner=partial(run_speech, host, d_vocab, points),
        generate=_no_generation,
        hears=partial(_heard, host, d_vocab),
        to_string=to_string,
        to_source=None,  # frames are named by it, too
    )


def _block(
    host: Unbridged, side: str, layer: int, points: dict[str, tuple[str, str, str]]
) -> Block:
    """Returns a block without norms, and adds where its activations are to ``points``."""
    module = stacks_of(host.original_model)[side].layers[layer]
    here = f"{side}.{layer}"

    def point(path: str, name: str, kind: str) -> str:
        points[f"{here}.{name}"] = (side, f"layers.{layer}{path}", kind)
        return f"{here}.{name}"

    attentions = tuple(
        AttentionSublayer(
            stack=side,
            kind=kind,
            pattern=point(f".{name}", f"{name}.pattern", "pattern"),
            value=point(f".{name}.v_proj", f"{name}.v", "heads out"),
            mixed=point(f".{name}.out_proj", f"{name}.z", "heads in"),
            key=point(f".{name}.k_proj", f"{name}.k", "heads out"),
            query=point(f".{name}.q_proj", f"{name}.q", "heads out"),
            weights=partial(_attention_weight, host, side, layer, name),
        )
        for name, (kind, _) in _ATTENTIONS.items()
        if name in module._modules
    )
    paths = {path for path, _ in module.named_modules()}
    pair = next((pair for pair in _NEURONS if paths.issuperset(pair)), None)
    if pair is None:
        raise UnsupportedModel(
            "the blocks of this model of sound cannot be read",
            f"a {type(module).__name__}",
            "attention and two linear layers, as in Whisper, wav2vec2 and HuBERT",
            "Use one of these.",
        )
    return Block(
        layer=layer,
        resid_in=point("", "resid_in", "in"),
        resid_out=point("", "resid_out", "out"),
        attentions=attentions,
        feed_forward=FeedForward(
            pre=point(f".{pair[0]}", "mlp.pre", "out"),
            post=point(f".{pair[1]}", "mlp.post", "in"),
            pre_linear=None,
            weights=partial(_neuron_weight, host, side, layer, pair),
        ),
    )


def _attention_weight(
    host: Unbridged, side: str, layer: int, name: str, weight: str
) -> Tensor | None:
    kind, _, letter = weight.partition("_")
    projection = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "out_proj"}.get(letter)
    if projection is None:
        return None
    module = getattr(stacks_of(host.original_model)[side].layers[layer], name)
    linear = _plain(getattr(module, projection), f"{side}.{layer}.{name}.{projection}")
    found = linear.weight if kind == "W" else linear.bias
    if found is None:
        return None
    found = host.handle.ready(found)
    if kind == "b":
        return found if letter == "O" else found.unflatten(0, (module.num_heads, -1))
    if letter == "O":
        return found.T.unflatten(0, (module.num_heads, -1))
    return found.unflatten(0, (module.num_heads, -1)).transpose(1, 2)


def _neuron_weight(
    host: Unbridged, side: str, layer: int, pair: tuple[str, str], weight: str
) -> Tensor | None:
    kind, _, leaf = weight.partition("_")
    if leaf not in ("in", "out"):
        return None
    block = stacks_of(host.original_model)[side].layers[layer]
    path = pair[leaf == "out"]
    linear = _plain(block.get_submodule(path), f"{side}.{layer}.{path}")
    return host.handle.ready(linear.weight.T if kind == "W" else linear.bias)


def _plain(linear: Any, path: str) -> Any:
    """Returns a linear layer, whose weight is what it computes with."""
    if unmerged(linear):
        raise adapters_apart(f"the weight of {path}")
    return linear


def _norm(module: Any, dtype: torch.dtype) -> Norm:
    weight, bias = (one.detach().to(dtype) for one in (module.weight, module.bias))
    return Norm("ln", weight, bias, float(module.eps))


def _placements(host: Unbridged, view: ModelView, side: str, block: Block) -> list[Block]:
    """Returns the readings of a block: with its norms before its sublayers, or behind them."""
    module = stacks_of(host.original_model)[side].layers[block.layer]

    def norm(name: str) -> Norm:
        return _norm(getattr(module, name), view.dtype)

    names = [own for name, (_, own) in _ATTENTIONS.items() if name in module._modules]
    result = []
    for place in ("norm_in", "norm_after"):
        attentions = tuple(
            replace(attention, **{place: norm(name)})
            for attention, name in zip(block.attentions, names, strict=True)
        )
        assert block.feed_forward is not None
        ff = replace(block.feed_forward, **{place: norm("final_layer_norm")})
        result.append(replace(block, attentions=attentions, feed_forward=ff))
    return result


def _final_norms(model: Any, handle: Handle) -> dict[str, Norm]:
    """Returns the norms behind the last blocks; wav2vec2's may stand before the first."""
    return {
        side: _norm(stack.layer_norm, handle.dtype)
        for side, stack in stacks_of(model).items()
        if "StableLayerNorm" in type(stack).__name__ or "Whisper" in type(stack).__name__
    }


def _readout(host: Unbridged) -> Readout:
    model, handle = host.original_model, host.handle
    side = "decoder" if "decoder" in stacks_of(model) else "encoder"
    if head_of(model) is None:
        refusal = four_parts(
            f"{type(model).__name__} has no vocabulary readout",
            "an encoder of sound without a head, or after an adapter that joins frames",
            "a decoder that predicts tokens, such as Whisper's, or a CTC head",
            "Maps of its layers are fine; vocabulary questions are not answered for this model.",
        )
        return Readout(None, None, lambda name: None, refusal=refusal)

    def read(name: str) -> Tensor | None:
        head = _plain(head_of(host.original_model), "the readout")
        weight = handle.ready(head.weight)
        if name == "W_U":
            return weight.T
        if name != "b_U":
            return None
        return weight.new_zeros(len(weight)) if head.bias is None else handle.ready(head.bias)

    weights: Weights = read
    return Readout(_final_norms(model, handle).get(side), None, weights)


def _no_generation(batch: Batch, count: int) -> list[list[int]]:
    raise refused("a transcript", "continued here")


def _heard(host: Unbridged, d_vocab: int, given: Any) -> tuple[Side, dict[str, Tensor]]:
    """Returns the frames of sound as tokens, and what the model is given.

    Raises:
        InvalidInput: If it is no sound that the model can hear.
    """
    model = host.original_model
    name, config = model.main_input_name, model.config
    given = sound_of(given, name)
    bins = getattr(config, "num_mel_bins", None) if name == "input_features" else None
    length = None if bins is None else 2 * config.max_source_positions
    sound = given if isinstance(given, Tensor) and given.is_floating_point() else torch.empty(0)
    fits, expected = sound.ndim == 2, "samples of shape [batch, sample], at 16 kHz"
    if bins is not None:
        fits = sound.shape[1:] == (bins, length)
        expected = f"features of shape [batch, {bins}, {length}]"
    if not fits or not sound.numel():
        raise InvalidInput(
            "a model of sound cannot hear this",
            describe(given),
            expected,
            "Make them with the model's feature extractor.",
        )
    count = config.max_source_positions if bins is not None else _frames(model, sound.shape[1])
    ids = (d_vocab + torch.arange(count)).repeat(len(sound), 1)
    return Side(ids, torch.ones_like(ids, dtype=torch.bool)), {name: sound}


def _frames(model: Any, samples: int) -> int:
    """Returns how many frames a model makes of samples."""
    count: Callable[..., Any] = model._get_feat_extract_output_lengths
    # What blocks see, before an adapter that joins frames.
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    result = int(count(samples, **options))
    if result < 1:
        raise InvalidInput(
            "a model of sound cannot hear this",
            f"{samples} samples",
            "at least one frame",
            "Give a longer sound.",
        )
    return result
