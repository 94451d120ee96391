"""How the models of the zoo are made: random weights, and every host without a network."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import os
import re
import unittest.mock
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import zoo_configs as rows
from torch import Tensor, nn


@functools.cache
def major() -> int:
    """Major version of the installed TransformerLens."""
    return int(importlib.metadata.version("transformer-lens").split(".")[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what hosts say while they build a model: prints, log lines, warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Older names of transformers 4, so that weights are the same under every version of it.
_RENAMED = {"embed_out.weight": "lm_head.weight"}
_EMBEDDING = re.compile(r"\b(pos_|token_type_)?emb|wte|wpe|shared")


def randomize(module: nn.Module, *, seed: int) -> None:
    """Give every parameter random values that depend on its name and the seed only.

    Matrices get a spread at which attention and feed-forward write about as much as the residual
    holds; norm weights stay around one, and biases around zero.
    """
    with torch.no_grad():
        for name, tensor in _free_tensors(module):
            name = _RENAMED.get(name, name)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            leaf = name.rsplit(".", 1)[-1]
            if leaf.startswith("b") or leaf == "final_logits_bias" or tensor.ndim == 1:
                # Norm weights start at one (at zero where the model adds the one itself).
                noise = 0.2 * noise + tensor.double().mean().round()
            else:
                noise *= 0.5 if _EMBEDDING.search(name) else 0.2
            # Values are exact in float32: hosts that pass weights through it lose nothing, and
            # models of either dtype hold the same numbers.
            tensor.copy_(noise.float())


def _free_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The learned tensors; not Marian's sinusoids, which are a constant kept as a parameter."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in module.named_buffers():
        if name.endswith(("final_logits_bias", "correction_bias", "expert_bias")):
            yield name, buffer


def hugging_face(
    model: str, config: str, options: dict[str, Any], *, dtype: torch.dtype, seed: int
) -> Any:
    """A random Hugging Face model in eval mode with eager attention."""
    import transformers

    with quiet(), torch.random.fork_rng(devices=[]):
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
        built.config.architectures = [model]
        if hasattr(built, "set_attn_implementation"):
            built.set_attn_implementation("eager")
        eager_experts(built, dtype)
        built.to(dtype)
        randomize(built, seed=seed)
    return built.eval()


def eager_experts(model: Any, dtype: torch.dtype) -> None:
    """Let a mixture of experts go from expert to expert where its kernels have no such dtype."""
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _transformer_lens(module: str = "") -> Any:
    """A module of the installed TransformerLens; what it holds depends on the version."""
    return importlib.import_module(f"transformer_lens.{module}".rstrip("."))


_SIZES = {
    "d_model": rows.D_MODEL,
    "n_heads": rows.N_HEADS,
    "d_head": rows.D_HEAD,
    "n_layers": rows.N_LAYERS,
    "d_mlp": rows.D_MLP,
    "d_vocab": rows.D_VOCAB,
    "n_ctx": rows.N_CTX,
}


def config_built(options: dict[str, Any], *, dtype: torch.dtype, seed: int) -> Any:
    """A random HookedTransformer from a HookedTransformerConfig."""
    lens = _transformer_lens()
    config = lens.HookedTransformerConfig(device="cpu", dtype=dtype, **(_SIZES | options))
    model = lens.HookedTransformer(config, tokenizer=load_tokenizer("gpt"))
    randomize(model, seed=seed)
    return model


def native(options: dict[str, Any], *, dtype: torch.dtype, seed: int) -> Any:
    """A random bridge from a TransformerBridgeConfig, without a Hugging Face model."""
    config = _transformer_lens("config").TransformerBridgeConfig(**(_SIZES | options))
    model = _transformer_lens("model_bridge").TransformerBridge.boot_native(config).to(dtype)
    randomize(model, seed=seed)
    return model.eval()


def load_tokenizer(kind: rows.TokenizerKind) -> Any:
    """A fresh tokenizer: TransformerLens changes the one it is given."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(rows.tokenizer_folder(kind))


def bridge(hf: Any, kind: rows.TokenizerKind, *, dtype: torch.dtype, processed: bool) -> Any:
    """Wrap a Hugging Face model in a bridge, which takes it over and changes it in place."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(
        "tiny", hf_model=hf, tokenizer=load_tokenizer(kind), device="cpu", dtype=dtype
    )
    if processed:
        model.enable_compatibility_mode()
        # 3.9 leaves the biases that folding creates in float32. Not the bridge's own `to`, which
        # goes through a state dict of all aliases for each part: half a second.
        nn.Module.to(model, dtype)
    return model


# HookedEncoder wants the weights of the one class and the name of the other.
_READ_AS = {"BertForPreTraining": "BertForMaskedLM"}
_UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


def hooked(
    hf: Any, kind: rows.TokenizerKind, host: str, *, dtype: torch.dtype, processed: bool
) -> Any:
    """Load a Hugging Face model into a Hooked* class without a network.

    The classes accept official names only and read the config from where the name points, so the
    name is a folder and the check of names is switched off.
    """
    loading = _transformer_lens("loading_from_pretrained")
    tokenizer = load_tokenizer(kind)
    hf.config.architectures = [_READ_AS.get(type(hf).__name__, type(hf).__name__)]
    # A family's name must not be in the path: TransformerLens would take the sizes from it.
    folder = f"{rows.scratch()}/{zlib.crc32(str(hf.config).encode())}"
    hf.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = _UNPROCESSED if host == "HookedTransformer" and not processed else {}
    with unittest.mock.patch.object(loading, "get_official_model_name", lambda name: name):
        model = getattr(_transformer_lens(), host).from_pretrained(
            folder, hf_model=hf, tokenizer=tokenizer, device="cpu", dtype=dtype, **options
        )
    return model.to(dtype)  # HookedEncoderDecoder keeps its relative position biases in float32


def hooked_gemma2(hf: Any, *, dtype: torch.dtype, processed: bool) -> Any:
    """Gemma 2 by hand: HookedTransformer has its sizes only under the official names."""
    lens = _transformer_lens()
    options = rows.FAMILIES["gemma2"].options
    config = lens.HookedTransformerConfig(
        d_model=rows.D_MODEL,
        d_head=rows.D_HEAD,
        n_heads=rows.N_HEADS,
        n_key_value_heads=options["num_key_value_heads"],
        d_mlp=rows.D_MLP,
        n_layers=rows.N_LAYERS,
        n_ctx=rows.N_CTX,
        d_vocab=rows.D_VOCAB,
        eps=hf.config.rms_norm_eps,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMSPre" if processed else "RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        positional_embedding_type="rotary",
        rotary_dim=rows.D_HEAD,
        rotary_base=10000,
        use_local_attn=True,
        window_size=options["sliding_window"],
        attn_types=["local", "global"],
        attn_scale=options["query_pre_attn_scalar"] ** 0.5,
        attn_scores_soft_cap=options["attn_logit_softcapping"],
        output_logits_soft_cap=options["final_logit_softcapping"],
        original_architecture="Gemma2ForCausalLM",
        device="cpu",
        dtype=dtype,
    )
    model = lens.HookedTransformer(config, tokenizer=load_tokenizer("llama"))
    weights = _transformer_lens("pretrained.weight_conversions").convert_gemma_weights(hf, config)
    if not processed:  # not through the processing, which is in float32 from 3.x on
        model.load_state_dict(model.fill_missing_keys(weights), strict=False)
        return model
    # As from_pretrained does for Gemma: neither RMS norm nor a soft cap allows centring.
    model.load_and_process_state_dict(weights, center_writing_weights=False, center_unembed=False)
    return model
