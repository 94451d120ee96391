"""Hugging Face encoder-decoders of text, read directly: DecoderLens needs only their states.

For those that TransformerLens has no class for, and for bridges that show too little for a view.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.decoder_prompt import decoder_prompt
from tl_contextmix.adapters.encoder_decoder.decoding import MemoryDecoder
from tl_contextmix.adapters.encoder_decoder.generation_config import end_tokens, require_followed
from tl_contextmix.adapters.encoder_decoder.hf_copy import bridge_twin
from tl_contextmix.adapters.encoder_decoder.model import (
    EncoderDecoder,
    module_norm,
    of_view,
    require_no_hooks_on,
)
from tl_contextmix.adapters.recognition import require_tokens
from tl_contextmix.adapters.running import (
    hooked_places,
    lock_of,
    require_no_autocast,
    require_no_dropout,
    without_hooks,
)
from tl_contextmix.adapters.unbridged import Place, Unbridged, keeping
from tl_contextmix.adapters.verification import relative_error, tolerance_of
from tl_contextmix.core.blocks import Batch, Block, Side
from tl_contextmix.core.model_view import Hooks, ModelView, PassOutput, Readout
from tl_contextmix.errors import UnsupportedModel, four_parts

# How encoders call their blocks, and the norm behind the last one.
_BLOCKS = ("block", "layers")
_NORMS = ("final_layer_norm", "layer_norm", "norm")
_LENGTHS = ("max_{}_position_embeddings", "max_position_embeddings")
# What encoders may be given of each token, besides its id: whether it attends to all.
_FURTHER = ("global_attention_mask",)
_PROBE = 4


def is_text(model: object) -> bool:
    """Whether a model is a Hugging Face encoder-decoder that reads token ids."""
    config = getattr(model, "config", None)
    stacks = [getattr(model, f"get_{side}", None) for side in ("encoder", "decoder")]
    return (
        isinstance(model, nn.Module)
        and not hasattr(model, "original_model")  # a bridge hands on what it does not have
        and bool(getattr(config, "is_encoder_decoder", False))
        and getattr(model, "main_input_name", "") == "input_ids"
        and hasattr(model, "generate")
        and all(stack is not None and _blocks(stack()) is not None for stack in stacks)
    )


def held_in(model: Any) -> Any | None:
    """Returns the Hugging Face encoder-decoder that a bridge holds, on the same weights.

    None where the bridge does something else: with hooks of the user's own, or wrongly.
    """
    original: Any = getattr(model, "original_model", None)
    if not is_text(original) or hooked_places(model) or hooked_places(original):
        return None
    twin = bridge_twin(model)
    if twin is None:
        return None
    twin.generation_config = original.generation_config
    weights = list(twin.parameters())
    device = weights[0].device
    ids = (11 + 7 * torch.arange(_PROBE)[None]).to(device) % int(original.config.vocab_size)
    with lock_of(model), torch.no_grad():
        try:
            own, plain = (
                one(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
                for one in (original, twin)
            )
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None
    tolerance = tolerance_of({weight.dtype for weight in weights}, device)
    return twin if relative_error(plain, own) <= tolerance else None


def from_text(model: Any, tokenizer: Any, language: str | None = None) -> EncoderDecoder:
    """Returns a Hugging Face model as an encoder-decoder.

    Args:
        model: A T5ForConditionalGeneration, LEDForConditionalGeneration or the like.
        tokenizer: Its tokenizer; None takes token ids and shows them as numbers.
        language: What its decoder is told, see `TokenInputs`.

    Raises:
        UnsupportedModel: If what its decoder reads is not known, or depends on other rows.
    """
    require_tokens(model)
    require_no_dropout(model)
    require_no_hooks_on([model, model.get_encoder()])
    settings = model.generation_config
    require_followed(settings, speech=False)
    d_vocab = len(model.get_input_embeddings().weight)
    host = Unbridged(model, d_vocab, True, lambda model: tokenizer)
    view = _view(host)
    require_no_autocast(view.device)
    decoder = MemoryDecoder(
        model=model,
        owner=model,
        dtype=view.dtype,
        start=decoder_prompt(host, language).ids,
        ends=end_tokens(settings),
        pad=settings.pad_token_id or 0,
        n_ctx=_longest(model, "decoder"),
    )
    found = of_view(
        view,
        decoder,
        tokenizer,
        language,
        states=lambda side, **further: _encoder_states(host, view, side, further),
        norm=None,
        direct=True,
        takes_further=True,
    )
    norm, stepwise = _probed(model, found)
    return replace(
        found,
        norm=None if norm is None else module_norm(model, norm),
        decoder=replace(decoder, stepwise=stepwise),
    )


def _blocks(stack: Any) -> nn.ModuleList | None:
    found = (getattr(stack, name, None) for name in _BLOCKS)
    return next((one for one in found if isinstance(one, nn.ModuleList) and len(one)), None)


def _longest(model: Any, side: str) -> int | None:
    """Returns the longest text of a side, or None if unlimited (relative positions)."""
    config = getattr(getattr(model, f"get_{side}")(), "config", model.config)
    found = (getattr(config, name.format(side), None) for name in _LENGTHS)
    return next((bound for bound in found if isinstance(bound, int)), None)


def _view(host: Unbridged) -> ModelView:
    """Returns a view whose blocks are read at their ends alone."""
    model = host.original_model
    refusal = four_parts(
        f"only DecoderLens reads a {type(model).__name__} directly",
        "another question",
        "a model of TransformerLens",
        "See load_model.",
    )
    return host.view(
        dict(model.named_parameters()),
        stacks={side: _ends(model, side) for side in ("encoder", "decoder")},
        readout=Readout(None, None, lambda name: None, refusal=refusal),
        final_norms={},
        n_ctx=_longest(model, "encoder"),
        limits=(refusal,),
        takes={name: 2 for name in _FURTHER if name in inspect.signature(model.forward).parameters},
        runner=lambda batch, hooks, *rest: _run(host, batch, hooks),
        generate=lambda batch, count: [],
    )


def _ends(model: Any, side: str) -> tuple[Block, ...]:
    blocks = _blocks(getattr(model, f"get_{side}")())
    assert blocks is not None
    return tuple(
        Block(n, f"{side}.{n}.hook_in", f"{side}.{n}.hook_out", (), None)
        for n in range(len(blocks))
    )


def _run(host: Unbridged, batch: Batch, hooks: Hooks, last: str = "") -> PassOutput:
    """Runs a model once and keeps the streams between its blocks, which nothing edits.

    With ``last``, the pass ends with the stream of that name.
    """
    model, decoder = host.original_model, batch.decoder
    assert decoder is not None
    places = {}
    for name, _ in hooks:
        side, layer, point = name.split(".")
        blocks = _blocks(getattr(model, f"get_{side}")())
        assert blocks is not None
        places[name] = Place(blocks[int(layer)], point.removeprefix("hook_"))
    device, output = next(model.parameters()).device, None
    pad = getattr(model.config, "pad_token_id", None)
    ids = batch.main.ids.masked_fill(~batch.main.mask, pad if isinstance(pad, int) else 0)
    with keeping(model, places, last) as kept:
        output = model(
            input_ids=ids.to(device),
            attention_mask=batch.main.mask.long().to(device),
            decoder_input_ids=decoder.ids.to(device),
            use_cache=False,
            **{name: value.to(device) for name, value in batch.further.items()},
        ).logits
    # Encoders of windows pad their input to whole windows (LED, Pegasus-X), and ProphetNet's
    # decoder has streams of further tokens behind the main one.
    lengths = {"encoder": ids.shape[1], "decoder": decoder.ids.shape[1]}
    shown = {name: kept[name][:, : lengths[name.partition(".")[0]]] for name in kept}
    return output, shown, {}


def _encoder_states(
    host: Unbridged, view: ModelView, side: Side, further: Mapping[str, Tensor]
) -> list[Tensor]:
    """Returns the encoder's residual streams of layers 0 to L, from one pass that ends with it."""
    blocks = view.stacks["encoder"]
    names = [blocks[0].resid_in, *(block.resid_out for block in blocks)]
    start = torch.zeros(len(side.ids), 1, dtype=torch.long)
    batch = Batch(side, Side(start, torch.ones_like(start, dtype=torch.bool)), further)
    _, kept, _ = _run(host, batch, [(name, None) for name in names], names[-1])
    return [kept[name].to(view.dtype) for name in names]


def _probed(model: Any, found: EncoderDecoder) -> tuple[nn.Module | None, bool]:
    """Returns the norm behind the last block, and whether logits must be taken step by step.

    Raises:
        UnsupportedModel: If neither that norm nor nothing makes what the decoder reads, or if its
            logits are others in a batch: rows of a batch are the layers of one text.
    """
    view, encoder = found.view, model.get_encoder()
    assert view is not None
    d_vocab = min(view.d_vocab, found.decoder.d_vocab)
    ids = (11 + 7 * torch.arange(2 * _PROBE)).view(2, _PROBE) % d_vocab
    side = Side(ids, torch.ones_like(ids, dtype=torch.bool))
    with without_hooks(model), torch.no_grad():
        last, like = found.states(side)[-1], next(encoder.parameters())
        mask = side.mask.long().to(like.device)
        read = encoder(input_ids=ids.to(like.device), attention_mask=mask)[0].to(view.dtype)
        norms = [None, *(getattr(encoder, name, None) for name in _NORMS)]
        options = {
            norm: last if norm is None else norm(last.to(like.dtype)).to(view.dtype)
            for norm in norms
        }
        norm, nearest = min(options.items(), key=lambda pair: relative_error(pair[1], read))
        error, whole, steps = relative_error(nearest, read), found.decoder, found.decoder
        steps = replace(steps, stepwise=True)
        both_logits = [one.logits(read, side.mask, ids) for one in (whole, steps)]
        stepwise = relative_error(both_logits[0], both_logits[1]) > view.tolerance
        for row in range(len(ids)):
            part = slice(row, row + 1)
            alone = (steps if stepwise else whole).logits(read[part], side.mask[part], ids[part])
            error = max(error, relative_error(both_logits[stepwise][part], alone))
    if error <= view.tolerance and not _drops(model):
        return norm, stepwise
    raise UnsupportedModel(
        f"cannot run the decoder of a {view.host} on a layer of its encoder",
        _drops(model) or f"a relative error of {error:.2g} against the model itself",
        "a decoder that reads the last block's output, normed or not, row by row",
        "Use another model.",
    )


def _drops(model: Any) -> str:
    """Returns how a model's experts leave out tokens by what else is in a batch, or at random."""
    config = model.config
    fraction = getattr(config, "moe_eval_capacity_token_fraction", 1.0)
    policy = getattr(config, "second_expert_policy", "all")
    if fraction < 1:
        return f"experts that leave tokens out (moe_eval_capacity_token_fraction={fraction})"
    return "" if policy == "all" else f"a second expert at random (second_expert_policy={policy!r})"
