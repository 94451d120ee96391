"""An encoder-decoder as one encoder of L layers and a decoder that reads any of them.

A TransformerLens model is read through its view; a Hugging Face speech model, for which
TransformerLens has no class, directly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.encoder_decoder.decoding import MemoryDecoder
from tl_contextmix.adapters.encoder_decoder.generation_config import (
    end_tokens,
    generation_settings,
    require_followed,
)
from tl_contextmix.adapters.encoder_decoder.hf_copy import bridge_twin, t5_twin
from tl_contextmix.adapters.reading import final_norm_modules
from tl_contextmix.adapters.running import hooked_places, is_hooked, lock_of, without_hooks
from tl_contextmix.adapters.tokenizers import decoder_start
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import UnsupportedModel, four_parts

_PROBE = 4


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder, whatever class holds it.

    Attributes:
        name: The model's name.
        host: Class of the model object.
        host_version: Version of TransformerLens, or of transformers for its own classes.
        processing: Weight processing that was found.
        fingerprint: Hash over a sample of every weight.
        n_layers: Number of encoder blocks, L.
        view: The view of a TransformerLens model; None for speech.
        states: From what `Side` (text) or features (speech) to the raw encoder states of layers
            0 to L, the last of which no norm has been applied to.
        norm: The encoder's final norm, or None where the architecture has none.
        decoder: Runs the decoder on encoder states.
        encode_target: From a target text to everything the decoder is to see and say: its start,
            the text and its end.
        to_string: A token id as text.
        to_text: Token ids as one text, special tokens left out.
        special: Ids that are no text: start, end, padding and their like.
    """

    name: str
    host: str
    host_version: str
    processing: tuple[str, ...]
    fingerprint: str
    n_layers: int
    view: ModelView | None
    states: Callable[[Any], list[Tensor]] = field(repr=False)
    norm: Callable[[Tensor], Tensor] | None = field(repr=False)
    decoder: MemoryDecoder = field(repr=False)
    encode_target: Callable[[str], list[int]] = field(repr=False)
    to_string: Callable[[int], str] = field(repr=False)
    to_text: Callable[[Sequence[int]], str] = field(repr=False)
    special: frozenset[int] = field(repr=False)


def from_view(model: Any, view: ModelView) -> EncoderDecoder:
    """Returns a TransformerLens encoder-decoder.

    Raises:
        UnsupportedModel: If it has one stack, or a decoder that cannot be run alone.
    """
    if len(view.stacks) != 2:
        raise UnsupportedModel(
            four_parts(
                "there are no encoder layers for a decoder to read",
                f"{view.name} ({view.host}) with the stack {', '.join(view.stacks)}",
                "an encoder-decoder such as T5, BART or Marian",
                "DecoderLens is about encoders. For the layers of a decoder, use a logit lens.",
            )
        )
    tokenizer = getattr(model, "tokenizer", None)
    original = getattr(model, "original_model", None)
    require_no_hooks_on([model] if original is None else [model, original.get_encoder()])
    decoder = _decoder(model, view)
    owner = weakref.ref(model)
    return EncoderDecoder(
        name=view.name,
        host=view.host,
        host_version=view.host_version,
        processing=view.processing,
        fingerprint=view.fingerprint,
        n_layers=len(view.stacks["encoder"]),
        view=view,
        states=lambda side: _view_states(view, side),
        norm=_view_norm(model, view),
        decoder=decoder,
        encode_target=lambda text: whole(_require_decoder_text(view)(text), decoder.ends),
        to_string=view.to_string,
        to_text=lambda ids: to_text(getattr(owner(), "tokenizer", None), ids),
        special=special_ids(decoder, tokenizer),
    )


def _require_decoder_text(view: ModelView) -> Callable[[str | None], list[int]]:
    assert view.encode_decoder is not None
    return view.encode_decoder


@dataclass(frozen=True)
class _Twin:
    """The plain model that decodes for another one.

    Attributes:
        view: The view of the other one when it was made: a new one means new weights.
        model: The plain model, or None where there is none that computes the same.
        reason: Why there is none.
    """

    view: ModelView
    model: Any
    reason: str


_TWINS: weakref.WeakKeyDictionary[nn.Module, _Twin] = weakref.WeakKeyDictionary()


def _decoder(model: Any, view: ModelView) -> MemoryDecoder:
    """Returns what decodes: a plain twin, or the bridge's own model where hooks must see it.

    Raises:
        UnsupportedModel: If neither can.
    """
    original = getattr(model, "original_model", None)
    hooked = view.hooked()
    # Not all modules of the model inside a bridge are the bridge's own.
    if original is not None and (hooked or hooked_places(original)):
        return _memory_decoder(model, view, original, alone=False)
    _require_no_decoder_hooks(view, hooked)
    with lock_of(model):
        twin = _TWINS.get(model)
        if twin is None or twin.view is not view:
            twin = _TWINS[model] = _make_twin(model, view)
    if twin.model is None and original is None:
        raise UnsupportedModel(twin.reason)
    if twin.model is None:
        return _memory_decoder(model, view, original, alone=False)
    return _memory_decoder(model, view, twin.model, alone=True)


def _memory_decoder(model: Any, view: ModelView, decoding: Any, *, alone: bool) -> MemoryDecoder:
    # Read at each call: the user may have changed them.
    settings = decoding.generation_config = generation_settings(model)
    require_followed(settings, speech=False)
    return MemoryDecoder(
        model=decoding,
        owner=model,
        dtype=view.dtype,
        start=decoder_start(model),
        ends=end_tokens(settings),
        pad=settings.pad_token_id or 0,
        n_ctx=view.n_ctx,
        alone=alone,
    )


def _require_no_decoder_hooks(view: ModelView, hooked: Sequence[str]) -> None:
    # The embedding itself is the decoder's too.
    places = [one for one in hooked if not one.startswith("encoder") and one != "hook_embed"]
    if places:
        raise UnsupportedModel(
            four_parts(
                f"hooks on the decoder of {view.host} are not followed while it decodes",
                ", ".join(places[:3]),
                "hooks on the encoder only",
                "Take them off, or use a TransformerBridge, whose hooks see every step.",
            )
        )


@torch.no_grad()
def _make_twin(model: Any, view: ModelView) -> _Twin:
    """Returns a plain model that computes what a model's decoder does, tried on a few tokens."""
    plain = t5_twin(model) if getattr(model, "original_model", None) is None else bridge_twin(model)
    if plain is None:
        return _Twin(view, None, "")
    ids = (11 + 7 * torch.arange(_PROBE)[None]) % view.d_vocab
    side = Side(ids, torch.ones_like(ids, dtype=torch.bool))
    inputs = torch.tensor([[decoder_start(model), *ids[0, 1:].tolist()]])
    decoder = Side(inputs, torch.ones_like(inputs, dtype=torch.bool))
    last = view.stacks["encoder"][-1].resid_out
    norm = _view_norm(model, view)
    with without_hooks(model):
        trace = view.run(Batch(side, decoder), [last])
        memory = trace[last] if norm is None else norm(trace[last])
    logits = _memory_decoder(model, view, plain, alone=True).logits(memory, side.mask, inputs)
    assert trace.logits is not None
    expected = trace.logits.to(logits.dtype)
    error = float((logits - expected).abs().max() / expected.abs().max())
    # A float64 T5 of Hugging Face computes its norms in float32: 1e-7 measured, 0.1 where wrong.
    if error <= max(view.tolerance, 1e-5):
        return _Twin(view, plain, "")
    reason = four_parts(
        f"the decoder of {view.name} cannot be run alone",
        f"a relative error of {error:.2g} against the model's logits",
        "the weights of a T5 as published: no biases",
        "Load it on a TransformerBridge of TransformerLens 4.",
    )
    return _Twin(view, None, reason)


def _view_norm(model: Any, view: ModelView) -> Callable[[Tensor], Tensor] | None:
    if "encoder" not in view.final_norms:
        return None
    return module_norm(model, final_norm_modules(model)["encoder"])


def module_norm(model: nn.Module, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the encoder's final norm as the model computes it, hooks of the user's included."""
    dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def norm(x: Tensor) -> Tensor:
        with lock_of(model):
            return module(x.to(dtype))

    return norm


def require_no_hooks_on(outer: Sequence[nn.Module]) -> None:
    """Checks that nothing is hooked of which only the inner modules are run.

    Raises:
        UnsupportedModel: If something is.
    """
    hooked = [type(module).__name__ for module in outer if is_hooked(module)]
    if hooked:
        raise UnsupportedModel(
            four_parts(
                "hooks on the whole model or its whole encoder are not followed",
                ", ".join(hooked),
                "hooks inside the encoder: on its blocks or its final norm",
                "Put them on the last block or on the final norm.",
            )
        )


class _Enough(Exception):
    """Ends a forward pass: what was asked for has been seen."""


def _view_states(view: ModelView, side: Side) -> list[Tensor]:
    """Returns the residual streams of the encoder from one pass that ends behind it."""
    blocks = view.stacks["encoder"]
    names = [blocks[0].resid_in, *(block.resid_out for block in blocks)]
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def edit(stream: Tensor) -> Tensor:
            kept[name] = stream.detach().to(view.device, view.dtype)
            if name == names[-1]:
                raise _Enough
            return stream

        return edit

    start = _require_decoder_text(view)(None)
    inputs = torch.tensor([start] * len(side.ids))
    decoder = Side(inputs, torch.ones_like(inputs, dtype=torch.bool))
    try:
        view.run(Batch(side, decoder), [], edits={name: keep(name) for name in names})
    except _Enough:
        return [kept[name] for name in names]
    # The pass ended without the last name: `run` has refused by now where hooks never fired.
    raise AssertionError(names[-1])


def whole(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """Returns decoder input ids with the end that they lack."""
    return ids if not ends or ids[-1] in ends else [*ids, ends[0]]


def special_ids(decoder: MemoryDecoder, tokenizer: Any) -> frozenset[int]:
    """Returns the ids that are no text."""
    named = set(getattr(tokenizer, "all_special_ids", ()))
    # An unknown word is a word.
    named.discard(getattr(tokenizer, "unk_token_id", None))
    return frozenset({*named, *decoder.ends, decoder.start, decoder.pad})


def to_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns ids as one text, as numbers where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(list(ids), skip_special_tokens=True)
