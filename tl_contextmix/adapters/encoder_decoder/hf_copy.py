"""Plain Hugging Face copies of TransformerLens models, for decoding.

A HookedEncoderDecoder's ``generate`` reruns encoder and decoder for every token, without beams. A
bridge's model can decode, but for small models half of the time goes into unused hook points and
eager attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.decoder_prompt import decoder_start

# Path component between a bridge's module and the one it wraps.
_WRAPPED = "_original_component."

# Hugging Face's layers of a decoder block: name, and the norm before it on the other side.
_ATTENTIONS = (("SelfAttention", "attn"), ("EncDecAttention", "cross_attn"))


def bridge_twin(model: Any) -> Any | None:
    """Returns the Hugging Face model inside a bridge without its hooks, sharing weights.

    None if a weight does not fit. The caller compares the two, because only the bridge knows how
    weights were processed.
    """
    original = model.original_model
    # Not the bridge's eager attention, which it needs only for patterns.
    config = copy.deepcopy(original.config)
    config._attn_implementation = None
    with torch.device("meta"):
        twin = type(original)(config)
    tensors = {
        name.replace(_WRAPPED, ""): tensor
        for listed in (original.named_parameters, original.named_buffers)
        for name, tensor in listed(remove_duplicate=False)
    }
    for path, module in twin.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, empty in table.items():
                found = tensors.get(f"{path}.{leaf}".lstrip("."))
                if empty is None and found is None:
                    continue
                # A bridge may have put the bias of the logits into one that the model has not.
                if found is None or (empty is not None and found.shape != empty.shape):
                    return None
                kept = isinstance(found, nn.Parameter) or table is module._buffers
                table[leaf] = found if kept else nn.Parameter(found, requires_grad=False)
    return twin.eval()


def t5_twin(model: Any) -> Any:
    """Returns a T5ForConditionalGeneration that decodes as a HookedEncoderDecoder does.

    It has a copy of the decoder's weights; its encoder has none and cannot run. The caller
    compares the two, because a HookedEncoderDecoder has biases that T5 lacks.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    cfg = model.cfg
    # transformers 5 accepts these two but does not declare them.
    further: dict[str, Any] = {
        "tie_word_embeddings": bool(cfg.tie_word_embeddings),
        "decoder_start_token_id": decoder_start(model),
    }
    config = T5Config(
        vocab_size=cfg.d_vocab,
        d_model=cfg.d_model,
        d_kv=cfg.d_head,
        d_ff=cfg.d_mlp,
        num_layers=1,
        num_decoder_layers=cfg.n_layers,
        num_heads=cfg.n_heads,
        relative_attention_num_buckets=cfg.relative_attention_num_buckets,
        relative_attention_max_distance=cfg.relative_attention_max_distance,
        layer_norm_epsilon=cfg.eps,
        dropout_rate=0.0,
        feed_forward_proj=cfg.act_fn,
        **further,
    )
    # No memory or random numbers for weights that are replaced.
    with torch.device("meta"):
        twin = T5ForConditionalGeneration(config)
    twin.load_state_dict(_weights(model), strict=False, assign=True)
    return twin.eval()


def _weights(model: Any) -> dict[str, Tensor]:
    found = {
        "shared.weight": model.embed.W_E,
        "decoder.embed_tokens.weight": model.embed.W_E,
        "lm_head.weight": model.unembed.W_U.T,
        "decoder.final_layer_norm.weight": model.decoder_final_ln.w,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            model.decoder[0].attn.rel_pos_bias.weight
        ),
    }
    for index, block in enumerate(model.decoder):
        path = f"decoder.block.{index}.layer"
        for place, (name, ours) in enumerate(_ATTENTIONS):
            attention = getattr(block, ours)
            for letter in "qkv":
                # [head d_model d_head] as rows of a linear layer.
                weight = getattr(attention, f"W_{letter.upper()}").permute(0, 2, 1).flatten(0, 1)
                found[f"{path}.{place}.{name}.{letter}.weight"] = weight
            found[f"{path}.{place}.{name}.o.weight"] = attention.W_O.flatten(0, 1).T
        found[f"{path}.2.DenseReluDense.wi.weight"] = block.mlp.W_in.T
        found[f"{path}.2.DenseReluDense.wo.weight"] = block.mlp.W_out.T
        for place, norm in enumerate((block.ln1, block.ln2, block.ln3)):
            found[f"{path}.{place}.layer_norm.weight"] = norm.w
    return {name: weight.detach() for name, weight in found.items()}
