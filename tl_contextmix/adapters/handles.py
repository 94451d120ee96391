"""A model that views do not keep alive, and the weights of its modules as the maths takes them."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.attention_weights import (
    adapted,
    has_adapters,
    is_special,
    layer_of,
    special_weight,
)
from tl_contextmix.adapters.recognition import Host
from tl_contextmix.core.blocks import Weights, require_weight
from tl_contextmix.core.half_weights import in_precision
from tl_contextmix.errors import UnsupportedModel


@dataclass(frozen=True)
class Handle:
    """A model that is not kept alive, and facts about its class.

    Attributes:
        model: Weak reference to the model.
        host: The class of TransformerLens it is, or is derived from.
        dtype: Dtype of the maths.
        device: Device of the maths: where the first weights are.
    """

    model: weakref.ref
    host: Host
    dtype: torch.dtype
    device: torch.device

    @property
    def bridge(self) -> bool:
        """Whether it is a TransformerBridge."""
        return self.host == "TransformerBridge"

    @property
    def ignores_masks(self) -> bool:
        """Whether the host drops an attention mask: HookedTransformer needs a causal one for it."""
        both_ways = getattr(self.get().cfg, "attention_dir", "causal") == "bidirectional"
        return both_ways and self.host == "HookedTransformer"

    def get(self) -> Any:
        """Returns the model.

        Raises:
            ReferenceError: If it has been deleted.
        """
        model = self.model()
        if model is None:
            raise ReferenceError("the model of this view has been deleted")
        return model

    def ready(self, weight: Tensor) -> Tensor:
        """Returns a weight in the dtype and on the device of the maths, see `in_precision`."""
        weight = weight.detach()
        if weight.dtype.itemsize >= self.dtype.itemsize:
            return weight.to(self.device, self.dtype)
        return in_precision(weight.to(self.device), self.dtype)

    def weights(self, path: str, renamed: dict[str, str | None] | None = None) -> Weights:
        """Returns a reader of the weights of one submodule.

        Args:
            path: Where the submodule is.
            renamed: Other names of weights on this host; None for one that it does not have.
        """
        renamed = renamed or {}

        @functools.cache  # a module that is replaced has a new reader
        def known() -> tuple[weakref.ref, bool, bool]:
            module = self.get().get_submodule(path)
            return weakref.ref(module), is_special(module), has_adapters(module)

        def read(name: str) -> Tensor | None:
            own, special, adapters = known()
            module = own()
            if module is None:
                module = self.get().get_submodule(path)
            attribute = renamed.get(name, name)
            weight = None
            if adapters and adapted(layer_of(module, name)):
                raise adapters_apart(f"the weight {name} of {path}")
            if special or adapters:
                weight = special_weight(module, name, int(self.get().cfg.n_heads))
            if weight is None and attribute is not None:
                weight = attribute_of(module, attribute)
            if weight is None:
                return None
            weight = self.ready(weight)
            if name in ("W_V", "b_V"):
                # Values shared by several query heads: one copy per query head.
                heads = require_weight(read, "W_O").shape[0]
                weight = weight.repeat_interleave(heads // weight.shape[0], dim=0)
            return weight

        return read


MERGE = (
    "Call merge_and_unload() first, or pass the PEFT model itself to load_model, which merges them "
    "in a copy (models of text)."
)


def adapters_apart(weight: str) -> UnsupportedModel:
    """Returns the refusal of a weight beside which a layer has adapters (PEFT)."""
    return UnsupportedModel(
        f"{weight} is not what it computes with",
        "adapters beside it that are not merged (PEFT)",
        "one matrix",
        MERGE,
    )


def attribute_of(module: nn.Module, name: str) -> Any:
    """Returns a weight or None; bridges raise AttributeError (4.x) or TypeError (3.x) instead.

    Latent attention raises NotImplementedError, layers with widths of their own a ValueError. Some
    aliases of a bridge still hold the Parameter that was there when it was built.
    """
    held = vars(module)
    path = held.get("_property_alias_registry", {}).get(name) if name in held else None
    try:
        return getattr(module, name, None) if path is None else attrgetter(path)(module)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
