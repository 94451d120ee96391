"""Resolves a request: where a model comes from, its kind, and the class that runs it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tl_contextmix.adapters.loading.classifiers import OF_TEXTS, OF_TOKENS, classifies
from tl_contextmix.adapters.recognition import major, require_tokens
from tl_contextmix.adapters.refusals import QUANTIZED, quantized_in
from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.errors import InvalidInput, UnsupportedModel

HostClass = Literal["hooked", "bridge"]
Kind = Literal["causal", "masked", "encoder-decoder"]

_T5_LIKE = ("t5", "mt5", "umt5")


@dataclass(frozen=True)
class Source:
    """Location and configuration of a model."""

    label: str
    """The name shown in results; never an absolute path."""
    location: str
    """Folder or hub name."""
    folder: bool
    config: Any
    kind: Kind
    hf_model: Any = None
    """The Hugging Face model, where it is in memory already."""
    tokenizer: Any = None
    """Its tokenizer, if one was given with it."""

    @property
    def hosted(self) -> bool:
        """Whether the model comes from the hub, by its name."""
        return not self.folder and self.hf_model is None

    @property
    def architecture(self) -> str:
        """Hugging Face's class that the model is loaded with."""
        if self.hf_model is not None:
            return type(self.hf_model).__name__
        if self.written and not self.headless:
            return self.written
        return str(_heads()[self.kind].get(self.config.model_type, self.written))

    @property
    def written(self) -> str:
        """The class that a checkpoint was written with, or an empty string."""
        return (self.config.architectures or [""])[0]

    @property
    def headless(self) -> bool:
        """Whether the checkpoint holds an encoder without its prediction head (BertModel)."""
        encoder = self.hf_model is None and self.kind == "masked" and not self.classifier
        return encoder and not self.written.endswith(("ForMaskedLM", "ForPreTraining"))

    @property
    def classifier(self) -> bool:
        """Whether it is a classifier that is read with its head: on TransformerLens 4."""
        named = self.written if self.hf_model is None else type(self.hf_model).__name__
        return major() >= 4 and classifies(named, self.config.model_type)

    @property
    def auto(self) -> Any:
        """Hugging Face's class that loads such models."""
        import transformers

        kinds: dict[str, Any] = {
            "causal": transformers.AutoModelForCausalLM,
            "masked": transformers.AutoModelForMaskedLM,
            "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
            OF_TEXTS: transformers.AutoModelForSequenceClassification,
            OF_TOKENS: transformers.AutoModelForTokenClassification,
        }
        ends = (kind for kind in (OF_TEXTS, OF_TOKENS) if self.architecture.endswith(kind))
        return kinds[next(ends, self.kind)]


@dataclass(frozen=True)
class Placement:
    """Device and dtype of the weights."""

    device: torch.device
    dtype: torch.dtype


def _heads() -> dict[Kind, dict[str, str]]:
    """Returns Hugging Face's classes with a language-modelling head, by kind and model type."""
    from transformers.models.auto import modeling_auto as auto

    tables: dict[Kind, tuple[str, ...]] = {
        "causal": ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM"),
        "masked": ("MASKED_LM",),
        "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    }
    return {
        kind: {
            str(model_type): str(name)
            for table in names
            for model_type, name in getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).items()
        }
        for kind, names in tables.items()
    }


def official_name(name: str) -> str | None:
    """Returns the hub name of a TransformerLens name or alias; None if there is none."""
    for module_name in ("supported_models", "loading_from_pretrained"):
        if importlib.util.find_spec(f"transformer_lens.{module_name}") is None:
            continue
        module = importlib.import_module(f"transformer_lens.{module_name}")
        for official in module.OFFICIAL_MODEL_NAMES:
            names = [official, *module.MODEL_ALIASES.get(official, [])]
            if name.lower() in (known.lower() for known in names):
                return official
    return None


def read_source(location: str, *, label: str, folder: bool) -> Source:
    """Reads the configuration under `location`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise not_found(label, location, folder, error) from error
    return Source(label, location, folder, config, _kind(config, label))


def held_source(model: Any, tokenizer: Any) -> Source:
    """Returns the source of a Hugging Face model that is in memory.

    Raises:
        InvalidInput: If no tokenizer is given and none is known by the model's name.
        UnsupportedModel: If it is no Hugging Face model, or a quantized one.
    """
    config = getattr(model, "config", None)
    kind = _held_kind(model)
    if kind is None:
        require_tokens(model)
        raise UnsupportedModel(
            "cannot load this object as a model",
            f"a {type(model).__module__}.{type(model).__name__}",
            "a Hugging Face model with a language-modelling head, or the name or folder of one",
            "Models of TransformerLens need no loading: pass them to the methods.",
        )
    packed = quantized_in(model)
    if packed:
        raise QUANTIZED.error(packed)
    location = str(getattr(config, "_name_or_path", "") or "")
    if tokenizer is None and not location:
        raise InvalidInput(
            "the model has no tokenizer",
            f"a {type(model).__name__} without the name that it was loaded by",
            "its tokenizer",
            "Pass tokenizer=.",
        )
    label = Path(location).name or type(model).__name__
    location = location or str(getattr(tokenizer, "name_or_path", "")) or label
    return Source(label, location, False, config, kind, model, tokenizer)


def _held_kind(model: Any) -> Kind | None:
    """Returns the kind of a model in memory, or None if it has no head that predicts tokens."""
    name, heads = type(model).__name__, _heads()
    config = getattr(model, "config", None)
    two = getattr(config, "is_encoder_decoder", False)
    # BART fills masks, too.
    if major() >= 4 and classifies(name, str(getattr(config, "model_type", ""))):
        return "masked"
    kinds: tuple[Kind, ...] = ("encoder-decoder",) if two else ("causal", "masked")
    return next((kind for kind in kinds if name in heads[kind].values()), None)


def not_found(label: str, location: str, folder: bool, error: Exception) -> InvalidInput:
    """Returns the error for a name or folder without a complete model."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if folder:
        return InvalidInput(
            "cannot load a model from the folder",
            f"{location!r} ({reason})",
            "a folder with config.json, weights and tokenizer",
            "Write the model and its tokenizer to the folder with save_pretrained.",
        )
    return InvalidInput(
        "cannot load the model",
        f"{label!r}, which is not a folder and not available from the hub ({reason})",
        f"a demo model ({', '.join(DEMO_NAMES)}), a local folder, or a hub name",
        "Check the spelling and the network (HF_HUB_OFFLINE disables downloads), or use a demo"
        " model.",
    )


def _kind(config: Any, label: str) -> Kind:
    """Returns the kind of model, from its configuration."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    heads = _heads()
    kinds: tuple[Kind, ...] = ("masked", "causal")
    for kind in kinds:
        if config.model_type in heads[kind]:
            return kind
    raise UnsupportedModel(
        f"cannot load {label!r}",
        f"the architecture {architecture or config.model_type!r}",
        "a causal language model, a masked language model or an encoder-decoder",
        "If it is one of these, load it with TransformerLens and pass the object.",
    )


def choose_host(source: Source, host: HostClass | None) -> HostClass:
    """Returns the class to use; raises UnsupportedModel if none runs the model correctly."""
    if host is not None and host not in get_args(HostClass):
        raise InvalidInput(
            "unknown TransformerLens class",
            f"host={host!r}",
            "'hooked', 'bridge' or None",
            "Omit host to use the model's default class.",
        )
    if source.hf_model is not None and host is None:
        host = "bridge"  # it wraps the model, where the Hooked classes convert a checkpoint
    reasons = {candidate: _why_not(source, candidate) for candidate in ("hooked", "bridge")}
    candidates: tuple[HostClass, ...] = ("hooked", "bridge") if host is None else (host,)
    for candidate in candidates:
        if not reasons[candidate]:
            return candidate
    other = [candidate for candidate, reason in reasons.items() if not reason]
    raise UnsupportedModel(
        f"cannot load {source.label!r}",
        f"a {source.config.model_type} model, but "
        + " and ".join(reasons[candidate] for candidate in candidates),
        "a TransformerLens class that runs it correctly",
        f"Pass host={other[0]!r}." if other else "Install TransformerLens 3 or later.",
    )


def _why_not(source: Source, host: str) -> str:
    """Returns why the installed TransformerLens cannot run the model on `host`; "" if it can."""
    hooked = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
    bridge = importlib.util.find_spec("transformer_lens.model_bridge") is not None
    model_type = source.config.model_type
    if host == "bridge":
        if not bridge:
            return "TransformerLens 2 has no TransformerBridge"
        if hooked and model_type in _T5_LIKE:
            return "on TransformerLens 3 the TransformerBridge of T5 fails or gives wrong patterns"
        return ""
    if not hooked:
        return "TransformerLens 4 has no Hooked classes"
    if source.hf_model is not None:
        return "its Hooked classes convert a folder, not a model in memory"
    if source.kind == "encoder-decoder":
        if model_type != "t5":
            return "HookedEncoderDecoder runs T5 only"
        if not bridge:
            return "on TransformerLens 2 the decoder of HookedEncoderDecoder attends to the future"
    if source.kind == "masked" and model_type != "bert":
        return "HookedEncoder runs BERT only"
    return ""


def load_tokenizer(source: Source) -> Any:
    """Loads the tokenizer from its path, by which TransformerLens reloads it."""
    if source.tokenizer is not None:
        return source.tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.location)
