"""Loads models on TransformerBridge (TransformerLens 3 and 4)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tl_contextmix.adapters.loading.architectures import read_as
from tl_contextmix.adapters.loading.classifiers import on_every_token
from tl_contextmix.adapters.loading.source import Placement, Source, load_tokenizer
from tl_contextmix.adapters.recognition import changed, host_version
from tl_contextmix.errors import UnsupportedModel, reason

# What TransformerLens raises for what it does not know, or without a library that it asks for.
_FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_bridge(source: Source, placement: Placement) -> Any:
    """Loads a model on TransformerBridge with unprocessed weights, its default."""
    from transformer_lens.model_bridge import TransformerBridge

    causal = source.kind == "causal"
    tokenizer: Any = None if causal and source.hosted else load_tokenizer(source)
    architecture = source.architecture
    alias, listed = read_as(architecture)
    hf_model = source.hf_model
    if source.headless and hf_model is None:
        hf_model = with_random_head(source, placement).to(placement.device)
    elif not listed and hf_model is None:
        # Only eager attention shows patterns.
        hf_model = source.auto.from_pretrained(
            source.location, dtype=placement.dtype, attn_implementation="eager"
        )
        hf_model = hf_model.to(placement.device).eval()
    if source.classifier:
        hf_model = on_every_token(hf_model)
    try:
        with contextlib.ExitStack() as stack:
            if not causal:
                # Else TransformerLens reloads it with this setting. Under transformers 5, that
                # replaces all special tokens: the </s> of T5 and BART, [CLS] and [SEP].
                told = {**tokenizer.init_kwargs, "add_bos_token": True}
                stack.enter_context(changed(tokenizer, "init_kwargs", told))
            if hf_model is not None:
                stack.enter_context(changed(hf_model.config, "architectures", [alias]))
            bridge = TransformerBridge.boot_transformers(
                source.location,
                device=str(placement.device),
                dtype=placement.dtype,
                tokenizer=tokenizer,
                hf_model=hf_model,
            )
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as e:
        expected = f"an architecture that TransformerLens {host_version()} knows"
        remedy = "Use another version of TransformerLens or its Hooked classes, or another model."
        # Not the list of all that TransformerLens knows.
        unknown = "Could not determine supported architecture" in str(e)
        seen = f"the architecture {architecture}" + ("" if unknown else f": {reason(e)}")
        if isinstance(e, ImportError):
            expected, remedy = "the libraries that its bridge needs", "Install what it names."
        raise UnsupportedModel(
            f"cannot load {source.label!r} on TransformerBridge",
            seen,
            expected,
            remedy,
        ) from e
    bridge.cfg.model_name = source.label
    if architecture.startswith("Switch"):
        show_patterns(bridge)
    if not causal:
        # TransformerLens would prepend a BOS that the tokenizer does not, and cut off </s>: the
        # opposite of what encoders were trained on.
        bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
        bridge.cfg.tokenizer_appends_eos = False
    return bridge


def show_patterns(bridge: Any) -> None:
    """Lets a bridge of Switch Transformers show attention patterns, as TransformerLens' T5 does.

    Without it, 4.3 shows position biases in their place.
    """
    for module in bridge.modules():
        if hasattr(module, "requires_relative_position_bias"):
            module.requires_relative_position_bias = True


def with_random_head(source: Source, placement: Placement) -> Any:
    """Returns a masked LM around a bare encoder, with a random head from a fixed seed."""
    from transformers import AutoModel, AutoModelForMaskedLM

    base = AutoModel.from_pretrained(source.location, dtype=placement.dtype)
    torch.default_generator.manual_seed(0)  # the caller restores its state
    # TransformerLens 3.9 sees patterns only with eager attention.
    model = AutoModelForMaskedLM.from_config(source.config, attn_implementation="eager")
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    return model.to(placement.dtype)
