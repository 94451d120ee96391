"""Further families of the TransformerBridge: not in the zoo, but read and checked once each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_build
from zoo_configs import D_VOCAB, TokenizerKind

_HEADS = {"num_key_value_heads": 2}
_WIDE = {**_HEADS, "head_dim": 8}
_WINDOW = {"sliding_window": 4}
_SIDES = ("encoder", "decoder")
# Half of the experts for each token; one layer of two has none, where a family mixes them.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@dataclass(frozen=True)
class Other:
    """A family as transformers builds it.

    Attributes:
        name: What its users call it.
        options: Of its configuration, beside `sizes`.
        sizes: Names and values that make it small.
        majors: Major versions of TransformerLens whose bridge can be read.
        tokenizer: Kind of an encoder-decoder's tokenizer; None for a causal model.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    )
    majors: tuple[int, ...] = (3, 4)
    tokenizer: TokenizerKind | None = None


OTHERS: dict[str, Other] = {
    "apertus": Other("Apertus", _HEADS),
    "arcee": Other("Arcee", _HEADS),
    "blenderbot": Other(
        "Blenderbot",
        sizes={
            "d_model": 32,
            "max_position_embeddings": 64,
            **{f"{side}_layers": 2 for side in _SIDES},
            **{f"{side}_attention_heads": 4 for side in _SIDES},
            **{f"{side}_ffn_dim": 48 for side in _SIDES},
        },
        majors=(4,),
        tokenizer="bart",
    ),
    "bloom": Other("BLOOM", sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": Other("CodeGen", {"rotary_dim": 4}, _GPT),
    "cohere": Other("Cohere", _HEADS),
    "cohere2": Other("Cohere 2", {**_HEADS, **_WINDOW}),
    "ernie4_5": Other("ERNIE 4.5", _WIDE),
    "ernie4_5_moe": Other(
        "ERNIE 4.5 MoE",
        {
            **_WIDE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": Other("EXAONE 4", {**_HEADS, **_WINDOW, "sliding_window_pattern": 2}, majors=(4,)),
    "falcon": Other(
        "Falcon",
        {"bias": True, "multi_query": False, "alibi": False, "parallel_attn": True},
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "flex_olmo": Other("FlexOlmo", {**_HEADS, **_EXPERTS}, majors=(4,)),
    "gemma": Other("Gemma", _WIDE),
    "gemma3_text": Other("Gemma 3", {**_WIDE, **_WINDOW}),
    "glm": Other("GLM", _WIDE),
    "glm4": Other("GLM 4", _WIDE),
    "glm4_moe": Other("GLM-4-MoE", {**_WIDE, **GROUPED}),
    "gpt_bigcode": Other("GPT-BigCode", sizes=_GPT),
    "gpt_neo": Other(
        "GPT-Neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64},
    ),
    "hunyuan_v1_dense": Other("Hunyuan", _WIDE),
    "jais2": Other("Jais 2"),
    "llama4_text": Other(
        "Llama 4",
        {
            **_WIDE,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
        },
    ),
    "ministral3": Other("Ministral 3", _WIDE),
    "mpt": Other("MPT", sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mt5": Other(
        "mT5",
        sizes={
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
        },
        majors=(4,),
        tokenizer="t5",
    ),
    "nanochat": Other("nanochat", _HEADS),
    "nemotron": Other("Nemotron", _HEADS),
    "olmo": Other("OLMo"),
    "olmo3": Other("OLMo 3", _WINDOW, majors=(4,)),
    "olmoe": Other("OLMoE", {**_HEADS, **_EXPERTS}),
    "phi": Other("Phi"),
    "phi3": Other("Phi-3", _HEADS),
    "qwen2_moe": Other("Qwen2-MoE", {**_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": Other("Qwen3", _WIDE),
    "qwen3_moe": Other("Qwen3-MoE", {**_WIDE, **_EXPERTS, "mlp_only_layers": [0]}),
    "seed_oss": Other("Seed-OSS", _WIDE),
    "smollm3": Other("SmolLM3", _HEADS),
    "stablelm": Other("StableLM", {"num_key_value_heads": 4}),
    "starcoder2": Other("StarCoder2", _HEADS),
    "vaultgemma": Other("VaultGemma", {**_WIDE, **_WINDOW}),
}


# Read, but for neurons; see `test_opaque.py`.
_OPAQUE = {
    "minimax_m2": Other(
        "MiniMax M2",
        {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
        majors=(4,),
    )
}


def build(kind: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Returns a random model of a family on a TransformerBridge."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    other = (OTHERS | _OPAQUE).get(kind, Other(kind))
    config = AutoConfig.for_model(
        kind, vocab_size=D_VOCAB, **{**other.sizes, **other.options, **options}
    )
    config.pad_token_id = 0
    kinds = AutoModelForSeq2SeqLM if other.tokenizer else AutoModelForCausalLM
    if other.tokenizer:
        config.decoder_start_token_id = 2
    with zoo_build.quiet():
        model = kinds.from_config(config, attn_implementation="eager")
        model = model.eval().to(dtype)
        zoo_build.eager_experts(model, dtype)
        zoo_build.randomize(model, seed=0)
        model.config.architectures = [type(model).__name__]
        kind_of_words = other.tokenizer or "gpt"
        return zoo_build.bridge(model, kind_of_words, dtype=dtype, processed=False)
