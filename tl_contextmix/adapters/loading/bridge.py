"""Loads models on TransformerBridge (TransformerLens 3 and 4)."""

from __future__ import annotations

from typing import Any

import torch

from tl_contextmix.adapters.loading.source import Placement, Source, load_tokenizer


def load_bridge(source: Source, placement: Placement) -> Any:
    """Loads a model on TransformerBridge; weights stay as they are, which is its default."""
    from transformer_lens.model_bridge import TransformerBridge

    # The tokenizer that the bridge would load itself, with add_bos_token=True, loses the </s> of T5
    # and the [CLS] and [SEP] of some BERT tokenizers under transformers 5.
    tokenizer = load_tokenizer(source) if source.folder else None
    hf_model = None
    if source.headless:
        hf_model = with_random_head(source, placement).to(placement.device)
    bridge = TransformerBridge.boot_transformers(
        source.location,
        device=str(placement.device),
        dtype=placement.dtype,
        tokenizer=tokenizer,
        hf_model=hf_model,
    )
    bridge.cfg.model_name = source.label
    if source.kind == "encoder-decoder":
        # TransformerLens would put </s> before a text and cut it off behind it: the reverse of
        # what encoders were trained on.
        bridge.cfg.default_prepend_bos = False
        bridge.cfg.tokenizer_appends_eos = False
    return bridge


def with_random_head(source: Source, placement: Placement) -> Any:
    """Returns the masked LM around a bare encoder; its head is the same random one every time."""
    from transformers import AutoModel, AutoModelForMaskedLM

    base = AutoModel.from_pretrained(source.location, dtype=placement.dtype)
    torch.default_generator.manual_seed(0)  # the caller restores its state
    # Eager attention, because TransformerLens 3.9 sees no patterns otherwise.
    model = AutoModelForMaskedLM.from_config(source.config, attn_implementation="eager")
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    return model.to(placement.dtype)
