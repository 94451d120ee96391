"""The rows of the zoo: one tiny configuration per model family, and their tokenizers.

Data only. `zoo.py` turns a row into a Hugging Face model, and that into any TransformerLens host.
Small numbers are chosen so that a mistake shows: sliding windows shorter than the inputs, soft caps
low enough to bite, different layer counts in the two stacks of Flan-T5.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

D_MODEL, N_HEADS, D_HEAD, N_LAYERS, D_MLP, D_VOCAB, N_CTX = 32, 4, 8, 2, 64, 61, 32

TokenizerKind = Literal["gpt", "llama", "bert", "roberta", "t5", "bart"]

BERT_LIKE = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": N_CTX,
}
LLAMA_LIKE = {
    **BERT_LIKE,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_LIKE = {
    "vocab_size": D_VOCAB,
    "n_positions": N_CTX,
    "d_model": D_MODEL,
    "d_kv": D_HEAD,
    "d_ff": D_MLP,
    "num_layers": N_LAYERS,
    # HookedEncoderDecoder reads one layer count for both stacks.
    "num_decoder_layers": N_LAYERS,
    "num_heads": N_HEADS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BART_LIKE = {
    "vocab_size": D_VOCAB,
    "d_model": D_MODEL,
    **{f"{side}_layers": N_LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": N_HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": D_MLP for side in ("encoder", "decoder")},
    "max_position_embeddings": N_CTX,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """One row: what to ask of transformers, and which TransformerLens classes load it.

    Attributes:
        model: Class name of the Hugging Face model.
        config: Class name of its configuration.
        options: Arguments of that configuration.
        tokenizer: Which of the tokenizers below goes with it.
        hosts: Class names of TransformerLens by major version.
        decoder_start: First token of the decoder, for encoder-decoders.
    """

    model: str
    config: str
    options: dict[str, Any] = field(hash=False)
    tokenizer: TokenizerKind
    hosts: dict[int, tuple[str, ...]] = field(hash=False)
    decoder_start: int | None = None


_HT, _HE, _HED, _TB = (
    "HookedTransformer",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "TransformerBridge",
)
_DECODER_ONLY = {2: (_HT,), 3: (_HT, _TB), 4: (_TB,)}
_BRIDGE = {3: (_TB,), 4: (_TB,)}
_BRIDGE_4 = {4: (_TB,)}

_GPT_IDS = {"bos_token_id": 0, "eos_token_id": 0}


def _causal(
    name: str, options: dict[str, Any], tokenizer: TokenizerKind, hosts: dict[int, tuple[str, ...]]
) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", options, tokenizer, hosts)


def _like_bart(name: str, hosts: dict[int, tuple[str, ...]]) -> Family:
    names = f"{name}ForConditionalGeneration", f"{name}Config"
    return Family(*names, BART_LIKE, "bart", hosts, decoder_start=2)


FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {
        "gpt2": Family(
            "GPT2LMHeadModel",
            "GPT2Config",
            # HookedTransformer reads n_ctx and takes d_mlp = 4 * d_model whatever n_inner says.
            {
                "vocab_size": D_VOCAB,
                "n_positions": N_CTX,
                "n_ctx": N_CTX,
                "n_embd": D_MODEL,
                "n_layer": 3,
                "n_head": N_HEADS,
                **_GPT_IDS,
            },
            "gpt",
            _DECODER_ONLY,
        ),
        "opt": _causal(
            "OPT",
            {
                "vocab_size": D_VOCAB,
                "hidden_size": D_MODEL,
                "num_hidden_layers": N_LAYERS,
                "num_attention_heads": N_HEADS,
                "ffn_dim": D_MLP,
                "max_position_embeddings": N_CTX,
                "word_embed_proj_dim": D_MODEL,
                **_GPT_IDS,
            },
            "gpt",
            _DECODER_ONLY,
        ),
        "neox": _causal(
            "GPTNeoX", {**BERT_LIKE, "rotary_pct": 0.5, **_GPT_IDS}, "gpt", _DECODER_ONLY
        ),
        "gptj": _causal(
            "GPTJ",
            {
                "vocab_size": D_VOCAB,
                "n_positions": N_CTX,
                "n_embd": D_MODEL,
                "n_layer": N_LAYERS,
                "n_head": N_HEADS,
                "rotary_dim": 4,
                **_GPT_IDS,
            },
            "gpt",
            _DECODER_ONLY,
        ),
        "llama": _causal(
            "Llama",
            {**LLAMA_LIKE, "num_hidden_layers": 3},
            "llama",
            _DECODER_ONLY,
        ),
        # HookedTransformer drops these biases without a word, so it is no host of this row.
        "llama_biased": _causal(
            "Llama",
            {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
            "llama",
            _BRIDGE,
        ),
        "mistral": _causal(
            "Mistral",
            {**LLAMA_LIKE, "sliding_window": 4},
            "llama",
            _DECODER_ONLY,
        ),
        # Half of the experts for each token.
        "mixtral": _causal(
            "Mixtral",
            {
                **LLAMA_LIKE,
                "intermediate_size": 24,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            "llama",
            _BRIDGE,
        ),
        "qwen2": _causal("Qwen2", LLAMA_LIKE, "llama", _DECODER_ONLY),
        "gemma2": _causal(
            "Gemma2",
            {
                **LLAMA_LIKE,
                "tie_word_embeddings": True,
                "head_dim": D_HEAD,
                "query_pre_attn_scalar": 16,
                "sliding_window": 4,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 5.0,
            },
            "llama",
            _DECODER_ONLY,
        ),
        "bert": Family(
            "BertForMaskedLM",
            "BertConfig",
            {**BERT_LIKE, "num_hidden_layers": 3},
            "bert",
            {2: (_HE,), 3: (_HE, _TB), 4: (_TB,)},
        ),
        "roberta": Family(
            "RobertaForMaskedLM",
            "RobertaConfig",
            {**BERT_LIKE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
            "roberta",
            _BRIDGE_4,
        ),
        # Norms behind the sublayers and nowhere before them; 3.x misreads it, see zoo_refused.py.
        "olmo2": _causal("Olmo2", LLAMA_LIKE, "llama", _BRIDGE_4),
        # HookedEncoderDecoder 2.18 and the bridge of 3.x get T5 wrong: see zoo_refused.py.
        "t5": Family(
            "T5ForConditionalGeneration",
            "T5Config",
            T5_LIKE,
            "t5",
            {3: (_HED,), 4: (_TB,)},
            decoder_start=0,
        ),
        "flan": Family(
            "T5ForConditionalGeneration",
            "T5Config",
            {
                **T5_LIKE,
                "num_decoder_layers": 3,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
            "t5",
            _BRIDGE_4,
            decoder_start=0,
        ),
        "bart": _like_bart("Bart", _BRIDGE),
        "marian": Family(
            "MarianMTModel", "MarianConfig", BART_LIKE, "bart", _BRIDGE, decoder_start=2
        ),
        # As BART, but with the norms before the sublayers and one behind each stack.
        "mbart": _like_bart("MBart", _BRIDGE_4),
        "m2m100": _like_bart("M2M100", _BRIDGE_4),
        "pegasus": _like_bart("Pegasus", _BRIDGE_4),
    }
)

# HookedTransformer built from a HookedTransformerConfig alone, with no Hugging Face counterpart.
CONFIG_BUILT: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "attn_only": {"attn_only": True, "normalization_type": "LN"},
        "ln_pre": {"normalization_type": "LNPre", "act_fn": "gelu_new"},
        "parallel": {"normalization_type": "LN", "act_fn": "gelu", "parallel_attn_mlp": True},
        "gqa": {
            "normalization_type": "RMS",
            "act_fn": "silu",
            "gated_mlp": True,
            "n_key_value_heads": 2,
            "positional_embedding_type": "rotary",
            "rotary_dim": D_HEAD,
            "final_rms": True,
        },
        "no_norm": {"normalization_type": None, "act_fn": "relu"},
        "solu": {"normalization_type": "LN", "act_fn": "solu_ln"},
        "both_ways": {
            "normalization_type": "LN",
            "act_fn": "gelu",
            "attention_dir": "bidirectional",
        },
    }
)
CONFIG_BUILT_HOSTS = {2: (_HT,), 3: (_HT,)}

_WORDS = (
    "the a cat dog sat on mat ran to of in is was paris london city france tower eiffel and not he "
    "she it they big small red blue green one two three four five six seven eight nine ten house "
    "tree river road king queen man woman old new day night sun moon sea then there here with from"
).split()

# Special tokens in the order of their ids, the role each plays, and the frame put around a text.
_TOKENIZERS: dict[TokenizerKind, tuple[list[str], dict[str, str], str | None]] = {
    "gpt": (
        ["<|endoftext|>"],
        dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        None,
    ),
    "llama": (
        ["<unk>", "<s>", "</s>"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "<s> $A",
    ),
    "bert": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "[CLS] $A [SEP]",
    ),
    "t5": (
        ["<pad>", "</s>", "<unk>"],
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
    ),
    "bart": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "cls_token": "<s>",
            "sep_token": "</s>",
        },
        "<s> $A </s>",
    ),
}
_TOKENIZERS["roberta"] = _TOKENIZERS["bart"]
FIRST_WORD_ID = 5
"""Ids from here on are words in every tokenizer of the zoo."""


@functools.cache
def scratch() -> str:
    """A folder for what TransformerLens insists on reading from disk; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="tl-contextmix-zoo-")
    atexit.register(folder.cleanup)
    return folder.name


@functools.cache
def tokenizer_folder(kind: TokenizerKind) -> str:
    """Write the word-level tokenizer of one kind to disk and return its folder.

    TransformerLens re-loads a tokenizer from the path it came from to change its options, so one
    that lives in memory only fails with a KeyError.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials, roles, frame = _TOKENIZERS[kind]
    vocab = {word: i for i, word in enumerate((specials + _WORDS)[:D_VOCAB])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=roles["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame is not None:
        used = [(word, vocab[word]) for word in specials if word in frame.split()]
        inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    path = f"{scratch()}/tokenizer-{kind}"
    PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(path)
    return path
