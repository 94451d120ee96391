"""Resolves a request: where a model comes from, its kind, and the class that runs it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.errors import InvalidInput, UnsupportedModel, bad, four_parts

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

    @property
    def headless(self) -> bool:
        """Whether the checkpoint holds an encoder without its prediction head (BertModel)."""
        architecture = (self.config.architectures or [""])[0]
        return self.kind == "masked" and not architecture.endswith(
            ("ForMaskedLM", "ForPreTraining")
        )


@dataclass(frozen=True)
class Placement:
    """Device and dtype of the weights."""

    device: torch.device
    dtype: torch.dtype


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


def not_found(label: str, location: str, folder: bool, error: Exception) -> InvalidInput:
    """Returns the error for a name or folder without a complete model."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if folder:
        return bad(
            "cannot load a model from the folder",
            f"{location!r} ({reason})",
            "a folder with config.json, weights and tokenizer",
            "Write the model and its tokenizer to the folder with save_pretrained.",
        )
    return bad(
        "cannot load the model",
        f"{label!r}, which is not a folder and not available from the hub ({reason})",
        f"a demo model ({', '.join(DEMO_NAMES)}), a local folder, or a hub name",
        "Check the spelling and the network (HF_HUB_OFFLINE disables downloads), or use a demo"
        " model.",
    )


def _kind(config: Any, label: str) -> Kind:
    """Returns the kind of model, from its configuration."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return "encoder-decoder"
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise UnsupportedModel(
        four_parts(
            f"cannot load {label!r}",
            f"the architecture {architecture or config.model_type!r}",
            "a causal language model, a masked language model or an encoder-decoder",
            "If it is one of these, load it with TransformerLens and pass the object.",
        )
    )


def choose_host(source: Source, host: HostClass | None) -> HostClass:
    """Returns the class to use; raises UnsupportedModel if none runs the model correctly."""
    if host is not None and host not in get_args(HostClass):
        raise bad(
            "unknown TransformerLens class",
            f"host={host!r}",
            "'hooked', 'bridge' or None",
            "Omit host to use the model's default class.",
        )
    reasons = {candidate: _why_not(source, candidate) for candidate in ("hooked", "bridge")}
    candidates: tuple[HostClass, ...] = ("hooked", "bridge") if host is None else (host,)
    for candidate in candidates:
        if not reasons[candidate]:
            return candidate
    other = [candidate for candidate, reason in reasons.items() if not reason]
    raise UnsupportedModel(
        four_parts(
            f"cannot load {source.label!r}",
            f"a {source.config.model_type} model, but "
            + " and ".join(reasons[candidate] for candidate in candidates),
            "a TransformerLens class that runs it correctly",
            f"Pass host={other[0]!r}." if other else "Install TransformerLens 3 or later.",
        )
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
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.location)
