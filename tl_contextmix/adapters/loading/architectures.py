"""Architectures that TransformerLens does not list, but whose models it runs.

Some are another one under a name of their own; for some the adapter is here. What a bridge then
computes is compared with the Hugging Face model before any question is answered.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

ALIASES = {
    "BlenderbotSmallForConditionalGeneration": "BartForConditionalGeneration",
    "CamembertForMaskedLM": "RobertaForMaskedLM",
    "MinistralForCausalLM": "MistralForCausalLM",
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "XLMRobertaForMaskedLM": "RobertaForMaskedLM",
}
"""Architectures that are built like another one, by Hugging Face's class."""


def read_as(architecture: str) -> tuple[str, bool]:
    """Returns the architecture as which a model is read, and whether TransformerLens loads it."""
    factory = importlib.import_module("transformer_lens.factories.architecture_adapter_factory")
    known = factory.SUPPORTED_ARCHITECTURES
    listed, own = known.get(architecture), _adapters(known).get(architecture)
    if listed is not None and listed is not own:
        return architecture, True
    if ALIASES.get(architecture) in known:
        return ALIASES[architecture], False
    if own is not None:
        factory.ArchitectureAdapterFactory.register_adapter(architecture, own)
        known[architecture] = own  # where `_hf_format` looks, which registration does not reach
    return architecture, own is None


def _adapters(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapters of this package, by architecture: of TransformerLens 4."""
    if "RobertaForMaskedLM" not in known:
        return {}
    module = importlib.import_module("tl_contextmix.adapters.loading.encoder_adapters")
    return module.ADAPTERS
