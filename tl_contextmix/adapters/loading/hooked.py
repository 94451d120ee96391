"""Loads models on the Hooked classes (TransformerLens 2 and 3).

Their from_pretrained accepts official names only. Folders are converted with the functions that
from_pretrained calls, and the result is compared with its source.
"""

from __future__ import annotations

import importlib
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tl_contextmix.adapters.loading.bridge import with_random_head
from tl_contextmix.adapters.loading.source import (
    Kind,
    Placement,
    Source,
    load_tokenizer,
    official_name,
)
from tl_contextmix.errors import UnsupportedModel, reason

_PARITY_TOLERANCE = 1e-3
"""Largest allowed difference in log-probability from the source, in float32. Correct conversions
of six families, trained and random, measure at most 2e-5; wrong ones 0.1 or more."""


def load_hooked(source: Source, placement: Placement) -> Any:
    """Loads a model on its Hooked class, weights unprocessed.

    Raises:
        UnsupportedModel: If the converted model would compute something else.
    """
    if source.kind == "causal" and not source.folder and official_name(source.location):
        return _hooked_class("causal").from_pretrained_no_processing(
            source.location, device=str(placement.device), dtype=placement.dtype
        )
    if source.kind == "masked":
        hf_model = _bert_for_pretraining(source, placement)
    else:
        hf_model = source.auto.from_pretrained(source.location, dtype=placement.dtype).eval()
    try:
        model = _convert(source, hf_model, placement)
        _require_parity(source, hf_model, model)
    except (AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot convert {source.label!r} for {_hooked_class(source.kind).__name__}",
            reason(error),
            "a model that TransformerLens converts correctly",
            "Pass host='bridge' under TransformerLens 3, or use TransformerLens 4.",
        ) from error
    return model


def _hooked_class(kind: Kind) -> Any:
    import transformer_lens

    name = {
        "causal": "HookedTransformer",
        "masked": "HookedEncoder",
        "encoder-decoder": "HookedEncoderDecoder",
    }[kind]
    return getattr(transformer_lens, name)


def _bert_for_pretraining(source: Source, placement: Placement) -> Any:
    """Loads any BERT as BertForPreTraining, because the converter reads its pooler and NSP head.

    Both are zero if the checkpoint has none. A missing LM head is random, as on a bridge.
    """
    from transformers import BertForPreTraining

    load: Any = BertForPreTraining.from_pretrained
    model, report = load(source.location, dtype=placement.dtype, output_loading_info=True)
    for name, parameter in model.named_parameters():
        optional = name.startswith(("bert.pooler.", "cls.seq_relationship."))
        if optional and name in report["missing_keys"]:
            torch.nn.init.zeros_(parameter)
    if source.headless:
        head = with_random_head(source, placement).cls.predictions
        model.cls.predictions.load_state_dict(head.state_dict())
    return model.eval()


def _convert(source: Source, hf_model: Any, placement: Placement) -> Any:
    """Converts a Hugging Face model, bypassing TransformerLens' list of model names."""
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    with TemporaryDirectory(prefix="tl_contextmix_") as folder:
        _converter_config(source).save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(
            folder, device=str(placement.device), dtype=placement.dtype
        )
        weights = loading.get_pretrained_state_dict(
            folder, cfg, hf_model=hf_model, dtype=placement.dtype
        )
    cfg.model_name = source.label
    cfg.tokenizer_name = source.location
    model = _hooked_class(source.kind)(cfg, load_tokenizer(source), move_to_device=False)
    if source.kind == "causal":
        model.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )
    else:
        missing, _ = model.load_state_dict(weights, strict=False)
        _require_complete(model, missing)
    return model.to(placement.device)


def _converter_config(source: Source) -> Any:
    """Returns the configuration with the fields that the converters read."""
    config = type(source.config)(**source.config.to_dict())
    if source.kind == "masked":
        config.architectures = ["BertForMaskedLM"]
    if config.model_type == "gpt2":
        config.n_ctx = config.n_positions
    if config.model_type == "t5" and not hasattr(config, "n_positions"):
        config.n_positions = 512  # only limits the tokenizer: T5 has relative positions
    return config


def _require_complete(model: torch.nn.Module, missing: list[str]) -> None:
    """Zeroes biases that a family lacks; raises ValueError if weights were not set.

    Otherwise they would hold uninitialized memory.
    """
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & set(missing):
        if not name.rsplit(".", 1)[-1].startswith("b_"):
            raise ValueError(f"the conversion does not set {name}")
        torch.nn.init.zeros_(parameters[name])


@torch.no_grad()
def _require_parity(source: Source, hf_model: Any, model: Any) -> None:
    """Raises ValueError unless the converted model's predictions match its source.

    Some converters ignore configuration values (d_mlp of GPT-2, the number of decoder layers of
    T5) and produce a model that runs but is wrong.
    """
    if model.cfg.dtype not in (torch.float32, torch.float64):
        return  # rounding alone can exceed the tolerance; the conversion is the same
    vocabulary = min(model.cfg.d_vocab, source.config.vocab_size)
    tokens = torch.tensor([[7, 11, 5, 8, 6]], device=model.cfg.device) % vocabulary
    hf_model = hf_model.to(tokens.device)
    if source.kind == "encoder-decoder":
        expected = hf_model(input_ids=tokens, decoder_input_ids=tokens[:, :3]).logits
        everything = torch.ones_like(tokens)
        found = model(tokens, tokens[:, :3], one_zero_attention_mask=everything)
    elif source.kind == "masked":
        expected, found = hf_model(tokens).prediction_logits, model(tokens)
    else:
        expected, found = hf_model(tokens, use_cache=False).logits, model(tokens)
    error = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    if not error <= _PARITY_TOLERANCE:
        raise ValueError(f"log-probabilities differ from Hugging Face by {error:.2g}")
