"""Further families of the TransformerBridge: not in the zoo, but read and checked once each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import zoo_build
from zoo_configs import BERT_LIKE, D_MODEL, D_VOCAB, TokenizerKind

from tl_contextmix import load_model

_HEADS = {"num_key_value_heads": 2}
_WIDE = {**_HEADS, "head_dim": 8}
_WINDOW = {"sliding_window": 4}
_SIDES = ("encoder", "decoder")
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
}
_FACTORS = {
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Half of the experts for each token; one layer of two has none, where a family mixes them.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 24}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
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
        kind: What transformers calls it, where its key is another name.
        loaded: Whether its bridge is one of `load_model`, not of TransformerLens alone.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: {**_SMALL})
    majors: tuple[int, ...] = (3, 4)
    tokenizer: TokenizerKind | None = None
    kind: str = ""
    loaded: bool = False


def _t5(layers: int) -> dict[str, int]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    return {**sizes, "num_layers": layers, "num_decoder_layers": layers}


def _bart(layers: int) -> dict[str, int]:
    return {
        "d_model": 32,
        "max_position_embeddings": 64,
        **{f"{side}_layers": layers for side in _SIDES},
        **{f"{side}_attention_heads": 4 for side in _SIDES},
        **{f"{side}_ffn_dim": 48 for side in _SIDES},
    }


OTHERS: dict[str, Other] = {
    "apertus": Other("Apertus", _HEADS),
    "arcee": Other("Arcee", _HEADS),
    "blenderbot": Other("Blenderbot", sizes=_bart(2), majors=(4,), tokenizer="bart"),
    "bloom": Other("BLOOM", sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": Other("CodeGen", {"rotary_dim": 4}, _GPT),
    "cohere": Other("Cohere", _HEADS),
    "cohere2": Other("Cohere 2", {**_HEADS, **_WINDOW}),
    "deepseek_v2": Other(
        "DeepSeek V2", {**_LATENT, **GROUPED, "topk_method": "group_limited_greedy"}, majors=(4,)
    ),
    "deepseek_v3": Other("DeepSeek V3", {**_LATENT, **GROUPED}, majors=(4,)),
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
    "gemma4_text": Other(
        "Gemma 4 (without per-layer embeddings)",
        {
            **_WIDE,
            **_WINDOW,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            # Wider heads in layers of full attention, whose values are the keys.
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
        majors=(4,),
    ),
    "glm": Other("GLM", _WIDE),
    "glm4": Other("GLM 4", _WIDE),
    "glm4_moe": Other("GLM-4-MoE", {**_WIDE, **GROUPED}),
    "gpt_bigcode": Other("GPT-BigCode", sizes=_GPT),
    "gpt_neo": Other(
        "GPT-Neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64},
    ),
    "gpt_oss": Other(
        "gpt-oss",
        {**_WIDE, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        majors=(4,),
    ),
    "granite": Other(
        "Granite", {**_HEADS, **_FACTORS, "attention_bias": True, "mlp_bias": True}, majors=(4,)
    ),
    "granitemoe": Other(
        "Granite MoE",
        {**_HEADS, **_FACTORS, "num_local_experts": 4, "num_experts_per_tok": 2},
        majors=(4,),
    ),
    "granitemoehybrid": Other(
        "Granite 4 (dense)",
        {
            **_HEADS,
            **_FACTORS,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "position_embedding_type": "rope",
        },
        majors=(4,),
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
    "minimax_m2": Other(
        "MiniMax M2",
        {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
        majors=(4,),
    ),
    "ministral3": Other("Ministral 3", _WIDE),
    "mpt": Other("MPT", sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mt5": Other("mT5", sizes=_t5(2), majors=(4,), tokenizer="t5"),
    "nanochat": Other("nanochat", _HEADS),
    "nemotron": Other("Nemotron", _HEADS),
    "olmo": Other("OLMo"),
    "olmo3": Other("OLMo 3", _WINDOW, majors=(4,)),
    "olmoe": Other("OLMoE", {**_HEADS, **_EXPERTS}),
    "phi": Other("Phi"),
    "phi3": Other("Phi-3", _HEADS),
    "phimoe": Other(
        "PhiMoE",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        majors=(4,),
        loaded=True,
    ),
    "qwen2_moe": Other("Qwen2-MoE", {**_HEADS, **_SHARED}),
    "qwen3": Other("Qwen3", _WIDE),
    "qwen3_5_text": Other(
        "Qwen3.5 (full attention)",
        {**_WIDE, **_DELTA, "layer_types": ["full_attention", "full_attention"]},
        majors=(4,),
    ),
    "qwen3_moe": Other("Qwen3-MoE", {**_WIDE, **_EXPERTS, "mlp_only_layers": [0]}),
    "seed_oss": Other("Seed-OSS", _WIDE),
    "smollm3": Other("SmolLM3", _HEADS),
    "stablelm": Other("StableLM", {"num_key_value_heads": 4}),
    "starcoder2": Other("StarCoder2", _HEADS),
    "switch_transformers": Other(
        "Switch Transformers",
        {
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 16,
        },
        _t5(2),
        majors=(4,),
        tokenizer="t5",
        loaded=True,
    ),
    "vaultgemma": Other("VaultGemma", {**_WIDE, **_WINDOW}),
    "youtu": Other("Youtu", _LATENT, majors=(4,)),
}

# Experts beside the layer that every token goes through.
_SOME = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
OTHERS["granitemoehybrid, experts"] = replace(
    OTHERS["granitemoehybrid"],
    name="Granite 4 (experts)",
    options=OTHERS["granitemoehybrid"].options | _SOME,
    kind="granitemoehybrid",
)
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
# In layer 0 no attention, but for Falcon-H1, which has both in every layer; see `test_hybrids.py`.
HYBRIDS: dict[str, Other] = {
    "falcon_h1": Other(
        "Falcon-H1",
        {
            **_WIDE,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_expand": 1,
            "key_multiplier": 0.7,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.6,
            "ssm_out_multiplier": 1.3,
            "lm_head_multiplier": 0.4,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.9, 0.7],
        },
    ),
    "granitemoehybrid": Other(
        "Granite 4",
        OTHERS["granitemoehybrid"].options | _SOME | {"layer_types": ["mamba", "attention"]},
    ),
    "jamba": Other(
        "Jamba",
        {
            **_HEADS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
        },
    ),
    "lfm2": Other(
        "LFM2",
        {
            **_HEADS,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2_moe": Other(
        "LFM2-MoE",
        {
            **_HEADS,
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "olmo_hybrid": Other(
        "OLMo-Hybrid", {**_HEADS, **_DELTA, **_MIXED, "linear_num_key_heads": 4, "pad_token_id": 0}
    ),
    "qwen3_5_moe_text": Other("Qwen3.5 MoE", {**_WIDE, **_DELTA, **_MIXED, **_SHARED}),
    "qwen3_5_text": Other("Qwen3.5", {**_WIDE, **_DELTA, **_MIXED}),
    "qwen3_next": Other("Qwen3-Next", {**_WIDE, **_DELTA, **_MIXED, **_SHARED}),
}


# A third sublayer ends each block, and layers 2 and 3 have the keys and values of layers 0 and 1;
# see `test_third_sublayers.py`.
ENDINGS = {
    "gemma4_text": Other(
        "Gemma 4",
        {
            **_WIDE,
            **_WINDOW,
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": D_VOCAB,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
        },
        majors=(4,),
    ),
}


_BERT = {**BERT_LIKE, "pad_token_id": 1}
# Masked models that are read from memory and from folders, see `test_hugging_face.py`; by the
# beginning of Hugging Face's names.
ENCODERS: dict[str, Other] = {
    "XLMRoberta": Other("XLM-R", sizes=_BERT, majors=(4,), tokenizer="roberta"),
    "Camembert": Other("CamemBERT", sizes=_BERT, majors=(4,), tokenizer="roberta"),
    "DistilBert": Other(
        "DistilBERT",
        sizes={
            "vocab_size": D_VOCAB,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
        majors=(4,),
        tokenizer="bert",
    ),
    "Electra": Other("ELECTRA", {"embedding_size": 16}, BERT_LIKE, majors=(4,), tokenizer="bert"),
    "Albert": Other(
        "ALBERT",
        # Two groups of two layers each, the first run twice.
        {
            "embedding_size": 16,
            "num_hidden_layers": 3,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
            "hidden_act": "gelu_new",
        },
        BERT_LIKE,
        majors=(4,),
        tokenizer="bert",
    ),
    "MPNet": Other("MPNet", {"pad_token_id": 1}, BERT_LIKE, majors=(4,), tokenizer="bert"),
    "DebertaV2": Other(
        "DeBERTa-v2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 3,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            "share_att_key": True,
        },
        BERT_LIKE,
        majors=(4,),
        tokenizer="bert",
    ),
    "ModernBert": Other(
        "ModernBERT",
        {
            "pad_token_id": 0,
            "local_attention": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            **{f"{name}_bias": True for name in ("attention", "mlp", "norm", "classifier")},
        },
        BERT_LIKE,
        majors=(4,),
        tokenizer="bert",
    ),
    "EuroBert": Other(
        "EuroBERT",
        {**_HEADS, "mlp_bias": True, "attention_bias": True, "pad_token_id": 0},
        BERT_LIKE,
        majors=(4,),
        tokenizer="bert",
    ),
}


_TEXT = {"vocab_size": D_VOCAB, **_SMALL, **_HEADS}
_SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
}
_QWEN_TOKENS = {
    "image_token_id": 60,
    "video_token_id": 59,
    "vision_start_token_id": 58,
    "vision_end_token_id": 57,
}
_QWEN_SIGHT = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "patch_size": 4,
}
# Models of images and text, asked about text; by the beginning of Hugging Face's names.
WRAPPERS: dict[str, Other] = {
    "Gemma3": Other(
        "Gemma 3 with images",
        {"mm_tokens_per_image": 4, "boi_token_index": 58, "eoi_token_index": 59},
        {
            "text_config": {"model_type": "gemma3_text", **_TEXT, **_WIDE, **_WINDOW},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGHT},
            "image_token_index": 60,
        },
        majors=(4,),
    ),
    "Llava": Other(
        "LLaVA",
        sizes={
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_SIGHT},
            "image_token_index": 60,
        },
        majors=(4,),
    ),
    "Mistral3": Other(
        "Mistral 3 with images",
        sizes={
            "text_config": {"model_type": "mistral", **_TEXT, "head_dim": 8},
            "vision_config": {"model_type": "pixtral", **_SIGHT, "head_dim": 8},
            "image_token_index": 60,
        },
        majors=(4,),
    ),
    "Qwen2_5_VL": Other(
        "Qwen2.5-VL",
        _QWEN_TOKENS,
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, **_SECTIONS},
            "vision_config": {"model_type": "qwen2_5_vl", **_QWEN_SIGHT},
        },
        majors=(4,),
    ),
    "Qwen3VL": Other(
        "Qwen3-VL",
        _QWEN_TOKENS,
        {
            "text_config": {"model_type": "qwen3_vl_text", **_TEXT, **_SECTIONS, "head_dim": 8},
            "vision_config": {
                "model_type": "qwen3_vl",
                **_QWEN_SIGHT,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        majors=(4,),
    ),
}


_GEMMA = {**_TEXT, **_WIDE, **_WINDOW, "num_hidden_layers": 3, "query_pre_attn_scalar": 16}
OTHERS["t5gemma"] = Other(
    "T5Gemma", sizes={side: {**_GEMMA, "num_hidden_layers": 2} for side in _SIDES}, tokenizer="t5"
)
# Encoder-decoders of which the Hugging Face model itself is asked, see
# `test_decoder_lens_direct.py`; by the beginning of Hugging Face's names.
DIRECT: dict[str, Other] = {
    "LED": Other(
        "LED",
        {"attention_window": 4},
        {**_bart(3), **{f"max_{side}_position_embeddings": 64 for side in _SIDES}},
        majors=(2, 3, 4),
    ),
    "LongT5": Other(
        "LongT5",
        {"local_radius": 3, "encoder_attention_type": "transient-global", "global_block_size": 2},
        _t5(3),
        majors=(2, 3, 4),
    ),
    "NllbMoe": Other(
        "NLLB-MoE",
        {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        _bart(3),
        majors=(2, 3, 4),
    ),
    "PegasusX": Other(
        "Pegasus-X", {"num_global_tokens": 3, "block_size": 4}, _bart(3), majors=(2, 3, 4)
    ),
    "ProphetNet": Other(
        "ProphetNet",
        {"ngram": 2},
        {
            "hidden_size": 32,
            **{f"num_{side}_layers": 3 for side in _SIDES},
            **{f"num_{side}_attention_heads": 4 for side in _SIDES},
            **{f"{side}_ffn_dim": 48 for side in _SIDES},
            "max_position_embeddings": 64,
        },
        majors=(2, 3, 4),
    ),
    "SwitchTransformers": Other(
        "Switch Transformers",
        {"num_experts": 4, **{f"num_sparse_{side}_layers": 1 for side in _SIDES}},
        _t5(3),
        majors=(2, 3, 4),
    ),
    "T5Gemma": Other("T5Gemma", sizes=dict.fromkeys(_SIDES, _GEMMA), majors=(2, 3, 4)),
    "UMT5": Other("umT5", sizes=_t5(3), majors=(2, 3, 4)),
}


def direct(kind: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Returns a random encoder-decoder of Hugging Face."""
    words = {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 1, "bos_token_id": 2}
    return zoo_build.hugging_face(
        f"{kind}ForConditionalGeneration",
        f"{kind}Config",
        {"vocab_size": D_VOCAB, **words, **DIRECT[kind].sizes, **DIRECT[kind].options, **options},
        dtype=dtype,
        seed=0,
    )


_WHISPER = {
    "vocab_size": D_VOCAB,
    "num_mel_bins": 8,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": D_MODEL,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "pad_token_id": 60,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def whisper(**options: Any) -> Any:
    """A tiny random Whisper of Hugging Face's, some options of its configuration changed."""
    names = ("WhisperForConditionalGeneration", "WhisperConfig")
    config = {**_WHISPER, **options}
    return zoo_build.hugging_face(*names, config, dtype=torch.float64, seed=0)


def build(
    kind: str,
    *,
    dtype: torch.dtype = torch.float64,
    hybrid: bool = False,
    ending: bool = False,
    **options: Any,
) -> Any:
    """Returns a random model of a family on a TransformerBridge."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    other = (HYBRIDS if hybrid else ENDINGS if ending else OTHERS).get(kind, Other(kind))
    config = AutoConfig.for_model(
        other.kind or kind, vocab_size=D_VOCAB, **{**other.sizes, **other.options, **options}
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
        if other.loaded:
            return load_model(model, tokenizer=zoo_build.load_tokenizer(kind_of_words))
        return zoo_build.bridge(model, kind_of_words, dtype=dtype, processed=False)
