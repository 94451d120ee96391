"""An encoder of L layers and a decoder that can read any of them.

TransformerLens models are read through their view; Hugging Face models, for which TransformerLens
has no class or whose bridges show too little, directly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.decoder_prompt import decoder_prompt
from tl_contextmix.adapters.encoder_decoder.decoding import MemoryDecoder
from tl_contextmix.adapters.encoder_decoder.generation_config import (
    end_tokens,
    generation_settings,
    require_followed,
)
from tl_contextmix.adapters.encoder_decoder.hf_copy import bridge_twin, t5_twin
from tl_contextmix.adapters.norm_reading import final_norm_modules
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.adapters.running import hooked_places, is_hooked, lock_of, without_hooks
from tl_contextmix.adapters.tokenizers import Labels, name_tokens, text_of
from tl_contextmix.adapters.verification import probe_batch, relative_error
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import UnsupportedModel, four_parts
from tl_contextmix.results import Provenance


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder of any class.

    Attributes:
        provenance: Returns where results with some options come from.
        n_layers: Number of encoder blocks, L.
        view: The model's view; None for speech. Of a `direct` one streams and text alone.
        states: Maps a `Side` (text) or features (speech) to the encoder states of layers 0 to L,
            before the final norm.
        norm: The encoder's final norm, or None if the architecture has none.
        decoder: Runs the decoder on encoder states.
        prompt: Returns the decoder's prompt, for every row of a source.
        encode_target: Maps a target text to the decoder's tokens after the prompt, with or
            without an end token.
        to_string: A token id as text.
        to_text: Token ids as one text, without special tokens.
        special: Ids of special tokens: start, end, padding and others.
        direct: Whether it is a Hugging Face model, which comes without its tokenizer.
        takes_further: Whether ``states`` takes what the view takes besides ids and mask.
    """

    provenance: Callable[[Mapping[str, Any]], Provenance] = field(repr=False)
    n_layers: int
    view: ModelView | None
    states: Callable[..., list[Tensor]] = field(repr=False)
    norm: Callable[[Tensor], Tensor] | None = field(repr=False)
    decoder: MemoryDecoder = field(repr=False)
    prompt: Callable[[Any], Tensor] = field(repr=False)
    encode_target: Callable[[str, bool], list[int]] = field(repr=False)
    to_string: Callable[[int], str] = field(repr=False)
    to_text: Callable[[Sequence[int]], str] = field(repr=False)
    special: frozenset[int] = field(repr=False)
    direct: bool = False
    takes_further: bool = False

    def named(self, labels: Labels | None) -> EncoderDecoder:
        """Returns the model with names of the user's own for its tokens; see `name_tokens`."""
        if labels is None or self.view is None:
            return self
        view = name_tokens(self.view, labels)
        return replace(self, view=view, to_string=view.to_string, to_text=view.to_text)


def from_view(model: Any, view: ModelView, language: str | None = None) -> EncoderDecoder:
    """Returns a TransformerLens encoder-decoder whose decoder is told a language.

    Raises:
        UnsupportedModel: If it has one stack, or a decoder that cannot run alone.
    """
    if len(view.stacks) != 2:
        raise UnsupportedModel(
            "DecoderLens needs an encoder-decoder",
            f"{view.name} ({view.host}), which has only the stack {', '.join(view.stacks)}",
            "an encoder-decoder such as T5, BART or Marian",
            "For the layers of a decoder, use the logit lens.",
        )
    tokenizer = getattr(model, "tokenizer", None)
    original = getattr(model, "original_model", None)
    require_no_hooks_on([model] if original is None else [model, original.get_encoder()])
    decoder = replace(_decoder(model, view), start=decoder_prompt(model, language).ids)
    return of_view(
        view,
        decoder,
        tokenizer,
        language,
        states=lambda side: _view_states(view, side),
        norm=_view_norm(model, view),
    )


def of_view(
    view: ModelView, decoder: MemoryDecoder, tokenizer: Any, language: str | None, **own: Any
) -> EncoderDecoder:
    """Returns an encoder-decoder whose names and text are those of a view; ``own`` is the rest."""
    encode = view.encode_decoder
    assert encode is not None

    def encode_target(text: str, end: bool) -> list[int]:
        ids = encode(text, language)[len(decoder.start) :]
        ended = not decoder.ends or (ids and ids[-1] in decoder.ends)
        return ids if ended or not end else [*ids, decoder.ends[0]]

    return EncoderDecoder(
        provenance=partial(provenance, view, "decoder_lens"),
        n_layers=len(view.stacks["encoder"]),
        view=view,
        decoder=decoder,
        prompt=lambda side: torch.tensor([decoder.start] * len(side.ids)),
        encode_target=encode_target,
        to_string=view.to_string,
        to_text=lambda ids: text_of(tokenizer, ids, skip_special_tokens=True),
        special=special_ids(decoder, tokenizer),
        **own,
    )


# The view of a model when a plain copy of it was made (a new one means new weights); the copy, or
# None; and why there is none.
_Twin = tuple[ModelView, Any, str]
_TWINS: weakref.WeakKeyDictionary[nn.Module, _Twin] = weakref.WeakKeyDictionary()


def _decoder(model: Any, view: ModelView) -> MemoryDecoder:
    """Returns the decoder: a plain copy, or the bridge's own model if it has hooks.

    Raises:
        UnsupportedModel: If neither can decode.
    """
    original = getattr(model, "original_model", None)
    hooked = view.hooked()
    # Hooks may also be on modules that a bridge does not wrap.
    if original is not None and (hooked or hooked_places(original)):
        return _memory_decoder(model, view, original, alone=False)
    _require_no_decoder_hooks(view, hooked)
    with lock_of(model):
        if model not in _TWINS or _TWINS[model][0] is not view:
            _TWINS[model] = _make_twin(model, view)
        _, twin, reason = _TWINS[model]
    if twin is not None:
        return _memory_decoder(model, view, twin, alone=True)
    if original is None:
        raise UnsupportedModel(reason)
    return _memory_decoder(model, view, original, alone=False)


def _memory_decoder(model: Any, view: ModelView, decoding: Any, *, alone: bool) -> MemoryDecoder:
    # Read at every call, because the user may change them.
    settings = decoding.generation_config = generation_settings(model)
    require_followed(settings, speech=False)
    return MemoryDecoder(
        model=decoding,
        owner=model,
        dtype=view.dtype,
        start=decoder_prompt(model).ids,
        ends=end_tokens(settings),
        pad=settings.pad_token_id or 0,
        n_ctx=view.n_ctx,
        alone=alone,
    )


def _require_no_decoder_hooks(view: ModelView, hooked: Sequence[str]) -> None:
    # The embedding is shared with the decoder.
    places = [one for one in hooked if not one.startswith("encoder") and one != "hook_embed"]
    if places:
        raise UnsupportedModel(
            f"hooks on the decoder of {view.host} have no effect while it decodes",
            ", ".join(places[:3]),
            "hooks on the encoder only",
            "Remove them, or use a TransformerBridge, whose hooks run at every step.",
        )


@torch.no_grad()
def _make_twin(model: Any, view: ModelView) -> _Twin:
    """Returns a plain copy of a model's decoder, verified on a few tokens."""
    plain = t5_twin(model) if getattr(model, "original_model", None) is None else bridge_twin(model)
    if plain is None:
        return view, None, ""
    batch = probe_batch(view)
    assert batch.decoder is not None
    last = view.stacks["encoder"][-1].resid_out
    norm = _view_norm(model, view)
    with without_hooks(model):
        trace = view.run(batch, [last])
        memory = trace[last] if norm is None else norm(trace[last])
    logits = _memory_decoder(model, view, plain, alone=True).logits(
        memory, batch.main.mask, batch.decoder.ids
    )
    assert trace.logits is not None
    error = relative_error(logits, trace.logits.to(logits.dtype))
    # Hugging Face's float64 T5 computes norms in float32: 1e-7 measured, 0.1 if wrong.
    if error <= max(view.tolerance, 1e-5):
        return view, plain, ""
    reason = four_parts(
        f"cannot run the decoder of {view.name} alone",
        f"a relative error of {error:.2g} against the model's logits",
        "a T5 without biases, as published",
        "Load it on a TransformerBridge of TransformerLens 4.",
    )
    return view, None, reason


def _view_norm(model: Any, view: ModelView) -> Callable[[Tensor], Tensor] | None:
    if "encoder" not in view.final_norms:
        return None
    return module_norm(model, final_norm_modules(model)["encoder"])


def module_norm(model: nn.Module, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns the encoder's final norm as the model computes it, including user hooks."""
    dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def norm(x: Tensor) -> Tensor:
        with lock_of(model):
            return module(x.to(dtype))

    return norm


def require_no_hooks_on(outer: Sequence[nn.Module]) -> None:
    """Checks that modules whose own forward is bypassed have no hooks.

    Raises:
        UnsupportedModel: If one has.
    """
    hooked = [type(module).__name__ for module in outer if is_hooked(module)]
    if hooked:
        raise UnsupportedModel(
            "hooks on the whole model or its whole encoder have no effect",
            ", ".join(hooked),
            "hooks inside the encoder: on its blocks or its final norm",
            "Move them to the last block or the final norm.",
        )


def _view_states(view: ModelView, side: Side) -> list[Tensor]:
    """Returns the encoder's residual streams from one pass that stops after it."""
    blocks = view.stacks["encoder"]
    names = [blocks[0].resid_in, *(block.resid_out for block in blocks)]
    assert view.encode_decoder is not None
    inputs = torch.tensor([view.encode_decoder(None)] * len(side.ids))
    decoder = Side(inputs, torch.ones_like(inputs, dtype=torch.bool))
    trace = view.run(Batch(side, decoder), names, logits=False)
    return [trace[name] for name in names]


def special_ids(decoder: MemoryDecoder, tokenizer: Any) -> frozenset[int]:
    """Returns the ids of special tokens."""
    named = set(getattr(tokenizer, "all_special_ids", ()))
    # The unknown token stands for a word.
    named.discard(getattr(tokenizer, "unk_token_id", None))
    return frozenset({*named, *decoder.ends, decoder.start[0], decoder.pad})
