"""Recognizes models without importing their classes.

TransformerLens 4 has no Hooked classes, and importing them raises.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from tl_contextmix.errors import UnsupportedModel

MIXERS = ("linear_attn", "mamba", "conv", "mixer")
"""What hybrids have beside attention, or in its place, as bridges name it."""
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
Host = Literal["HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "TransformerBridge"]


def every_module(model: nn.Module) -> list[nn.Module]:
    """Returns what ``model.modules()`` yields, in its order and much sooner."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if children := module._modules:  # most have none
                waiting.extend(reversed(children.values()))
    return [*found]


def inner(module: Any) -> Any:
    """Returns the module of Hugging Face that one of a bridge wraps; any other one as it is."""
    while isinstance(held := getattr(module, "original_component", None), nn.Module):
        module = held
    return module


@contextmanager
def changed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Changes an attribute for a while."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def eps_of(module: Any, default: float) -> float:
    """Returns what a norm adds to the mean square, by either of its names."""
    found = (getattr(module, name, None) for name in ("eps", "variance_epsilon"))
    return float(next((eps for eps in found if eps is not None), default))


@functools.cache
def major() -> int:
    """Returns the major version of TransformerLens, detected from its modules.

    The version number does not suffice: a git checkout reports 0.0.0.
    """
    if importlib.util.find_spec("transformer_lens.HookedTransformer") is None:
        return 4
    return 2 if importlib.util.find_spec("transformer_lens.model_bridge") is None else 3


@functools.cache
def host_version() -> str:
    """Returns TransformerLens' version string."""
    return importlib.metadata.version("transformer-lens")


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is read.

    Attributes:
        model: The model.
        host: Its TransformerLens class, or base class.
        major: Major version of TransformerLens.
        architecture: The host's name for the architecture, or an empty string.
    """

    model: Any
    host: Host
    major: int
    architecture: str

    @property
    def bridge(self) -> bool:
        """Whether it is a TransformerBridge."""
        return self.host == "TransformerBridge"

    @property
    def encoder_only(self) -> bool:
        """Whether the only stack is an encoder, as in BERT."""
        if self.host == "HookedEncoder":
            return True
        if self.architecture.endswith(("ForMaskedLM", *_CLASSIFIERS)) or (
            self.architecture == "BertModel"
        ):
            return True
        # attention_dir is unreliable on a bridge, reliable on HookedTransformer.
        return not self.bridge and self.model.cfg.attention_dir == "bidirectional"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what a classifier predicts, of texts or of tokens; empty for other models."""
        if not (self.bridge and self.architecture.endswith(_CLASSIFIERS)):
            return ()
        config = self.hf_config()
        return tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels))

    @property
    def t5(self) -> bool:
        """Whether it is T5 or a variant with relative positions."""
        relative = getattr(self.model.cfg, "positional_embedding_type", "")
        return relative == "relative_positional_bias" or "T5" in self.architecture

    def has_class(self, *words: str) -> str:
        """Returns the name of the first module class that contains one of the words, or ""."""
        modules = every_module(self.model)
        kinds = {*map(type, modules)}
        kinds = {kind for kind in kinds if any(word in kind.__name__ for word in words)}
        # A bridge's class of experts may hold a dense layer.
        found = (m for m in modules if type(m) in kinds and not getattr(m, "bound_dense", False))
        return next((type(module).__name__ for module in found), "")

    def block_modules(self) -> list[tuple[str, nn.Module]]:
        """Returns the blocks of a bridge with their paths."""
        lists = ("blocks", "encoder_blocks", "decoder_blocks")
        return [
            (f"{path}.{index}", block)
            for path in lists
            for index, block in enumerate(self.model._modules.get(path) or ())
        ]

    def blocks_without_mixers(self) -> str:
        """Returns the path of the first block in which nothing known mixes tokens, or ""."""
        for path, block in self.block_modules():
            if not {"attn", "self_attn", *MIXERS} & set(block._modules):
                return path
        return ""

    def hf_config(self) -> Any:
        """Returns the Hugging Face config of a bridge, or None."""
        return getattr(getattr(self.model, "original_model", None), "config", None)


def maths_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the maths: at least single precision, to which the rest is upcast."""
    return weight.dtype if weight.dtype == torch.float64 else torch.float32


def token_embedding(model: Any) -> Any:
    """Returns the weights of the token embedding of a TransformerLens model.

    A bridge of T5Gemma has one for each side and none of its own; they are tied.
    """
    sides = model._modules.get("encoder_embed")
    return model.W_E if sides is None else sides.original_component.weight


def require_tokens(model: Any) -> None:
    """Checks that a Hugging Face model reads the tokens of a text and no others.

    Raises:
        UnsupportedModel: If it reads images alone (ViT), or trained vectors before the text (prompt
            and prefix tuning of PEFT).
    """
    adapters = getattr(model, "active_peft_config", None)
    kinds = ("is_prompt_learning", "is_adaption_prompt")
    if any(getattr(adapters, kind, False) for kind in kinds):
        raise UnsupportedModel(
            "trained prompts and prefixes are not supported: they are no tokens of a text",
            f"a {type(model).__name__} with virtual tokens",
            "adapters that change weights (LoRA, IA3), which load_model merges",
            "Ask about the base model.",
        )
    if getattr(model, "main_input_name", None) == "pixel_values":
        raise UnsupportedModel(
            "models of images are not supported: their positions are no tokens of a text",
            f"a {type(model).__name__}, which reads images (pixel_values)",
            "a model of text or sound",
            "Models of images and text (LLaVA, Gemma 3) are asked about text.",
        )


def recognise(model: Any) -> Facts:
    """Returns what is known of a TransformerLens model.

    Raises:
        UnsupportedModel: If it is not a TransformerLens model, or has no weights.
    """
    mro = {cls.__name__ for cls in type(model).__mro__}
    host = next((name for name in get_args(Host) if name in mro), None)
    known = isinstance(model, nn.Module) and next(model.parameters(), None) is not None
    if not known or host is None:
        require_tokens(model)
        remedy = "or wrap a Hugging Face model in a TransformerBridge"
        if hasattr(model, "merge_and_unload"):
            remedy = "or load_model(model), which merges the adapters; of sound, merge_and_unload()"
        raise UnsupportedModel(
            "not a TransformerLens model with weights",
            f"a {type(model).__module__}.{type(model).__name__}",
            "a HookedTransformer, HookedEncoder, HookedEncoderDecoder or TransformerBridge",
            f"Use tl_contextmix.load_model(name), {remedy}.",
        )
    cfg = model.cfg
    architecture = getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "")
    return Facts(model=model, host=host, major=major(), architecture=str(architecture or ""))
