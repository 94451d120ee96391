"""Reads how a model turns its last residual stream into logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from tl_contextmix.adapters.attention_weights import adapted
from tl_contextmix.adapters.handles import Handle, adapters_apart
from tl_contextmix.adapters.norm_reading import final_norm_modules, read_norm
from tl_contextmix.core.blocks import Weights, affine
from tl_contextmix.core.model_view import Readout
from tl_contextmix.errors import four_parts


def read_readout(handle: Handle, architecture: str) -> Readout:
    """Returns the readout of a model; the identity check says whether it is right."""
    model = handle.get()
    refusal = _headless(model, architecture) or _adapted(model)
    if refusal:
        return Readout(norm=None, head=None, weights=lambda name: None, refusal=refusal)
    dense = _dense_head(handle)
    final = final_norm_modules(model).get("decoder")
    norm = None if final is None or dense is not None else read_norm(final, handle)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return Readout(
        norm=norm,
        head=dense,
        weights=_unembed_weights(handle),
        scale=_tied_scale(handle, architecture) * _logit_scale(handle, architecture),
        soft_cap=cap if cap is not None and cap > 0 else None,
    )


def _headless(model: Any, architecture: str) -> str:
    config = getattr(getattr(model, "original_model", None), "config", None)
    published = (getattr(config, "architectures", None) or [architecture])[0]
    marked = getattr(model, "_tl_contextmix_headless", False)
    if not (marked or published == "BertModel"):
        return ""
    return four_parts(
        "vocabulary readouts are not available for this model",
        "an encoder published without a masked-LM head (its head weights would be random)",
        "a model with a trained head, for example BertForMaskedLM",
        "Maps of its layers are fine; for predictions load a checkpoint that has the head.",
    )


def _adapted(model: Any) -> str:
    """Returns why an unembedding with adapters is not read."""
    if not adapted(model._modules.get("unembed")):
        return ""
    return f"{adapters_apart('the weight W_U of unembed')} Maps of its layers are fine."


def _unembed_weights(handle: Handle) -> Weights:
    def read(name: str) -> Tensor | None:
        model = handle.get()
        weight = getattr(model, name)
        extra = None
        if name == "b_U":
            # BART and Marian add this after the unembedding and outside b_U.
            extra = getattr(getattr(model, "original_model", None), "final_logits_bias", None)
        weight = handle.ready(weight)
        return weight if extra is None else weight + handle.ready(extra)[0]

    return read


def _tied_scale(handle: Handle, architecture: str) -> float:
    """Returns T5's factor on tied embeddings."""
    model = handle.get()
    # mT5 of transformers 5 never scales, whatever is tied.
    t5 = handle.host == "HookedEncoderDecoder" or (
        ("T5" in architecture or architecture.startswith("Switch"))
        and not architecture.startswith(("MT5", "T5Gemma"))
    )
    config = getattr(getattr(model, "original_model", None), "config", model.cfg)
    # transformers 5 scales where `scale_decoder_outputs` says so, and ties the two by default.
    scaled = getattr(config, "scale_decoder_outputs", None)
    tied = getattr(config, "tie_word_embeddings", False) if scaled is None else scaled
    return float(model.cfg.d_model) ** -0.5 if t5 and tied else 1.0


# Where configurations have a factor on logits; others have one that is not applied.
_LOGIT_SCALES = {
    "Cohere": "logit_scale",
    "Granite": "logits_scaling",
    "FalconH1": "lm_head_multiplier",
}


def _logit_scale(handle: Handle, architecture: str) -> float:
    """Returns the factor on logits of the families that have one."""
    config = getattr(getattr(handle.get(), "original_model", None), "config", None)
    for family, name in _LOGIT_SCALES.items():
        scale = getattr(config, name, None) if architecture.startswith(family) else None
        if scale is not None:
            return 1 / float(scale) if family == "Granite" else float(scale)  # it divides
    return 1.0


def _dense_head(handle: Handle) -> Callable[[Tensor], Tensor] | None:
    """Returns the layers of a masked-LM head, or a classifier's, before the last; or None."""
    head = handle.get()._modules.get("mlm_head")
    if head is None:
        return None
    activation = _head_activation(handle)
    modules = handle.get()._modules
    # In front of it (ModernBERT's own last norm), and behind it (not in classifiers).
    first, last = (
        None if module is None else read_norm(module, handle)
        for module in (
            modules.get("encoder_ln_final"),
            modules.get("ln_final") if handle.bridge else head.ln,
        )
    )

    def apply(x: Tensor) -> Tensor:
        # Read at each use: a view must keep no weight alive, nor one that was replaced.
        head = handle.get()._modules["mlm_head"]
        if handle.bridge:
            weight, bias = head.original_component.weight.T, head.original_component.bias
        else:
            weight, bias = head.W, head.b
        bias = None if bias is None else handle.ready(bias)
        x = x if first is None else first(x)
        x = activation(affine(x, handle.ready(weight), bias))
        return x if last is None else last(x)

    return apply


def _head_activation(handle: Handle) -> Callable[[Tensor], Tensor]:
    """Returns the activation of a masked-LM head: what stands beside its dense layer."""
    original = getattr(handle.get(), "original_model", None)
    dense = handle.get()._modules["mlm_head"]
    for module in [] if original is None else original.modules():
        if any(child is dense for child in module._modules.values()):
            for name in ("transform_act_fn", "activation", "act"):
                result: Callable[[Tensor], Tensor] | None = getattr(module, name, None)
                if callable(result):
                    return result
    return functional.gelu  # HookedEncoder's and RoBERTa's, whatever the configuration says
