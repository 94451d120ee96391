"""Unsupported models, whose numbers would be wrong, with the reason and a remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tl_contextmix.adapters.recognition import Facts, every_module
from tl_contextmix.errors import UnsupportedModel, four_parts


@dataclass(frozen=True)
class Refusal:
    """One kind of unsupported model.

    Attributes:
        name: The kind, as users call it.
        found: Returns what was found, or an empty string if the refusal does not apply.
        reason: Why its numbers would be wrong.
        remedy: What the user can do.
    """

    name: str
    found: Callable[[Facts], str]
    reason: str
    remedy: str

    def error(self, seen: str) -> UnsupportedModel:
        """Returns the error, given what was found."""
        return UnsupportedModel(
            f"{self.name} is not supported: {self.reason}",
            seen,
            "blocks of attention and a feed-forward layer",
            self.remedy,
        )


def _t5_on_2(facts: Facts) -> str:
    old = facts.major < 3 and facts.host == "HookedEncoderDecoder"
    return "HookedEncoderDecoder of TransformerLens 2" if old else ""


def _t5_on_bridge_3(facts: Facts) -> str:
    old = facts.major == 3 and facts.bridge and "T5For" in facts.architecture
    return f"{facts.architecture} on TransformerBridge 3" if old else ""


def _set(facts: Facts, family: str, name: str) -> str:
    """Returns a setting of a family's configuration, or an empty string if it is off."""
    value = getattr(facts.hf_config(), name, None)
    named = facts.architecture.startswith(family) and value
    return f"{facts.architecture} with {name}={value}" if named else ""


def _recurrence(facts: Facts) -> str:
    """Returns what mixes tokens where no block has attention, or in a block that cannot be read."""
    blocks = facts.block_modules()
    if any({"attn", "self_attn"} & set(block._modules) for _, block in blocks):
        return facts.has_class("RWKV", "RecurrentGemma") or facts.blocks_without_mixers()
    return facts.has_class("SSM", "Mamba", "GatedDeltaNet", "RWKV") or facts.blocks_without_mixers()


def quantized_in(model: nn.Module) -> str:
    """Returns the first quantized layer of a model, or an empty string."""
    for module in every_module(model):
        found = _packed(module)
        if found is not None:
            name = next(name for name, one in model.named_modules() if one is module)
            return f"{found}{type(module).__name__} in {name or 'the model itself'}"
    return ""


def _packed(module: nn.Module) -> str | None:
    """Returns which weight of a module is quantized: "" for a quantized layer, None for none."""
    if _quantizes(type(module)):
        return ""
    for table in (module._buffers, module._parameters):
        for own, weight in table.items():
            if weight is None:
                continue
            narrow = weight.dtype.itemsize == 1 and weight.dtype != torch.bool
            packed = (narrow or weight.dtype == torch.int32) and "weight" in own
            if packed or type(weight).__module__.startswith("torchao"):
                return f"{own} of {weight.dtype} in a "
    return None


@functools.cache
def _quantizes(kind: type) -> bool:
    return any(word in f"{kind.__module__}.{kind.__name__}".lower() for word in _QUANTIZERS)


# Libraries that quantize, and their layers, as their modules' paths and names have them.
_QUANTIZERS = (
    *("quantized", "bitsandbytes", "linear4bit", "linear8bit", "quantlinear", "gptq", "awq"),
    *("hqq", "quanto", "aqlm", "eetq", "torchao", "compressed_tensors", "fp8", "fp4", "bitlinear"),
    *("higgs", "vptq", "metallinear"),
)


def _no_tokens(facts: Facts) -> str:
    """Returns what a model reads that is no text."""
    name = getattr(getattr(facts.model, "original_model", None), "main_input_name", "input_ids")
    read = {"pixel_values": "images", "input_values": "sound", "input_features": "sound"}.get(name)
    return f"{facts.architecture}, which reads {read} ({name})" if read else ""


def _biases_for_patterns(facts: Facts) -> str:
    """Returns what a bridge of Switch Transformers shows as patterns, see `load_model`."""
    if not facts.architecture.startswith("Switch"):
        return ""
    flag = "requires_relative_position_bias"
    modules = [one for one in every_module(facts.model) if hasattr(one, flag)]
    return (
        "" if all(getattr(one, flag) for one in modules) else f"{facts.architecture}, {flag}=False"
    )


QUANTIZED = Refusal(
    "a quantized model",
    lambda facts: quantized_in(facts.model),
    "its weights are packed with scales of their own, and what is recomputed needs them dense",
    "Load the model without quantization, in bfloat16 or float32, or dequantize it first "
    "(model.dequantize() in Hugging Face).",
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "a model of images or sound",
        _no_tokens,
        "its positions are no tokens of a text",
        "Use a model of text; of Whisper, wav2vec2 and HuBERT pass the Hugging Face model itself.",
    ),
    QUANTIZED,
    Refusal(
        "T5 on HookedEncoderDecoder 2.x",
        _t5_on_2,
        "its decoder's self-attention attends to the future, unlike T5's",
        "Use TransformerLens 3.x (HookedEncoderDecoder) or 4.x (TransformerBridge); decoder_lens "
        "takes the Hugging Face model itself.",
    ),
    Refusal(
        "T5 on TransformerBridge 3.x",
        _t5_on_bridge_3,
        "its attention pattern hooks hold position biases instead of probabilities",
        "Use HookedEncoderDecoder on 3.x, or TransformerLens 4.x.",
    ),
    Refusal(
        "Switch Transformers as TransformerLens loads it",
        _biases_for_patterns,
        "its attention pattern hooks hold position biases instead of probabilities",
        "Load it with load_model, which mends that; decoder_lens takes it as it is.",
    ),
    Refusal(
        "Falcon with ALiBi",
        # As the eager path of Hugging Face does, which the plain one does not.
        lambda facts: _set(facts, "Falcon", "alibi"),
        "TransformerLens adds twice the position bias that the model was trained with",
        "Use a Falcon with rotary positions (falcon-7b and later).",
    ),
    Refusal(
        "DeBERTa-v2 with a convolution",
        lambda facts: _set(facts, "Deberta", "conv_kernel_size"),
        "after its first block a convolution mixes tokens between the blocks",
        "Use one without (DeBERTa-v3).",
    ),
    Refusal(
        "state-space model (Mamba, SSM)",
        _recurrence,
        "it mixes tokens by recurrence, not by attention",
        "Use a transformer, or a hybrid with layers of attention.",
    ),
    Refusal(
        "LED or LongT5",
        lambda facts: (
            facts.architecture if facts.architecture.startswith(("LED", "LongT5")) else ""
        ),
        "its encoder attends in windows, without a full attention pattern",
        "Use BART or T5, which have full attention; decoder_lens takes it.",
    ),
)


def require_supported(facts: Facts) -> None:
    """Checks that the model is supported.

    Raises:
        UnsupportedModel: If it is not.
    """
    for refusal in REFUSALS:
        seen = refusal.found(facts)
        if seen:
            raise refusal.error(seen)


def solu_refusal(model: nn.Module) -> str:
    """Returns why the feed-forward block cannot be decomposed, or an empty string."""
    name = str(getattr(getattr(model, "cfg", None), "act_fn", ""))
    if not name.startswith("solu"):
        return ""
    return four_parts(
        "cannot decompose the feed-forward block through SoLU",
        f"act_fn={name!r}",
        "an elementwise activation",
        "SoLU has a softmax over the layer. Use 'attn_out', 'resid_mid' or 'mlp_in', which do not "
        "need it.",
    )
