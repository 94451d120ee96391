"""Weights of attention whose bridge does not show them: latent attention, Gemma 4's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_contextmix.adapters.recognition import eps_of


def is_special(module: nn.Module) -> bool:
    """Whether a module has weights that the bridge itself does not show."""
    return "v_norm" in module._modules or is_latent(module) or borrows(module)


def borrows(module: nn.Module) -> bool:
    """Whether a module's keys and values are an earlier layer's (Gemma 4)."""
    return bool(getattr(getattr(module, "original_component", None), "is_kv_shared_layer", False))


# Where a module keeps the layer of a weight.
_LAYERS = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
_LAYERS |= {"W_in": "in", "W_gate": "gate", "W_out": "out"}


def has_adapters(module: nn.Module) -> bool:
    """Whether one of a module's layers may have adapters (PEFT), merged or not."""
    return any(map(_is_adapter, module._modules.values()))


def _is_adapter(module: nn.Module | None) -> bool:
    return wraps(getattr(module, "original_component", None))


def wraps(layer: Any) -> bool:
    """Whether a layer is PEFT's, around one of the model's own."""
    return callable(getattr(layer, "get_base_layer", None))


def adapted(held: nn.Module | None) -> bool:
    """Whether the layer in a bridge's is `unmerged`."""
    return unmerged(getattr(held, "original_component", None))


def unmerged(layer: Any) -> bool:
    """Whether a layer computes with adapters (PEFT) that are not merged into its weight."""
    if not wraps(layer):
        return False
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return False
    return bool(active_in(layer))


def active_in(layer: Any) -> set[str]:
    """Returns the active adapters of those that a layer has: others may have none here."""
    active = getattr(layer, "active_adapters", ())
    return {*active} & {*getattr(layer, "_get_available_adapters", lambda: active)()}


def layer_of(module: nn.Module, name: str) -> nn.Module | None:
    """Returns the layer of a module that has a weight; None where it is the module's own."""
    return module._modules.get(_LAYERS.get(name, ""))


def special_weight(module: nn.Module, name: str, heads: int) -> Tensor | None:
    """Returns a weight of an attention module; None where the bridge itself shows it rightly."""
    if name == "W_O" and _is_adapter(held := layer_of(module, name)):
        layer: Any = getattr(held, "original_component", None)
        if isinstance(base := layer.get_base_layer(), nn.Linear):
            # A bridge takes a square one for transposed.
            return base.weight.T.unflatten(0, (heads, -1))
    if name == "W_O" and borrows(module):
        return _own_width(module, name, heads)
    if "v_norm" in module._modules and name in ("W_Q", "W_K", "W_V", "W_O"):
        return _own_width(module, name, heads)
    return _latent_weight(module, name) if is_latent(module) else None


def is_latent(module: nn.Module) -> bool:
    """Whether a module is latent attention, whose values come out of a compressed stream."""
    return "kv_b_proj" in module._modules


def _own_width(module: nn.Module, name: str, heads: int) -> Tensor:
    """Returns a weight of Gemma 4, whose layers have heads of unlike width.

    Where there are no values of their own, they are the keys', normed.
    """
    layers: dict[str, Any] = module._modules
    W_O: Tensor = layers["o"].original_component.weight.T.unflatten(0, (heads, -1))
    if name == "W_O":
        return W_O
    layer = layers.get(name[-1].lower()) or layers["k"]
    return layer.original_component.weight.unflatten(0, (-1, W_O.shape[1])).transpose(1, 2)


def _latent_weight(module: nn.Module, name: str) -> Tensor | None:
    """Returns a weight of latent attention; those of values are the product of its matrices."""
    original: Any = module.original_component
    if name == "W_O":
        return original.o_proj.weight.T.unflatten(0, (-1, original.v_head_dim))
    if name == "b_O":
        return original.o_proj.bias
    kind, _, letter = name.partition("_")
    if name in ("W_Q", "b_Q"):
        return _latent_query(original, kind)
    if letter not in ("V", "K"):
        return None
    nope = original.qk_nope_head_dim
    heads = original.kv_b_proj.weight.unflatten(0, (-1, nope + original.v_head_dim))
    own = heads[:, nope:] if letter == "V" else heads[:, :nope]
    weight, *bias = compression(module)
    found = _expanded(weight, bias, own * original.kv_a_layernorm.weight, kind)
    if letter == "K" and found is not None:
        project, rank = original.kv_a_proj_with_mqa, original.kv_lora_rank
        shared = project.weight[rank:].T if kind == "W" else project.bias[rank:]
        found = torch.cat([found, shared.expand(len(found), *shared.shape)], dim=-1)
    return found


def _latent_query(original: Any, kind: str) -> Tensor | None:
    """Returns weight or bias of latent attention's queries, which may be compressed, too."""
    width = (-1, original.qk_nope_head_dim + original.qk_rope_head_dim)
    if getattr(original, "q_lora_rank", None) is not None:
        expand = original.q_b_proj.weight.unflatten(0, width) * original.q_a_layernorm.weight
        first = original.q_a_proj
        return _expanded(first.weight, [] if first.bias is None else [first.bias], expand, kind)
    if kind == "W":
        return original.q_proj.weight.unflatten(0, width).transpose(1, 2)
    return None if original.q_proj.bias is None else original.q_proj.bias.view(width)


def _expanded(weight: Tensor, bias: list[Tensor], expand: Tensor, kind: str) -> Tensor | None:
    """Returns weight or bias of a compression and of what it is expanded by, as one."""
    if kind == "W":
        return torch.einsum("mr,hdr->hmd", weight.T, expand)
    return torch.einsum("mr,hdr->hmd", bias[0][None], expand)[:, 0] if bias else None


def latent_scales(
    module: nn.Module, x: Tensor, name: str, ready: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns what divides queries (``"Q"``) or keys (``"K"``) of latent attention.

    ``x`` is the normed stream of one position; ``ready`` brings weights to the dtype of the maths.
    """
    original: Any = module.original_component
    nope, rope = original.qk_nope_head_dim, original.qk_rope_head_dim
    ones = torch.ones(nope + rope, dtype=x.dtype, device=x.device)
    if name == "K":
        ones[:nope] = _scale(original.kv_a_layernorm, x, compression(module), ready)
    elif getattr(original, "q_lora_rank", None) is not None:
        first = original.q_a_proj
        some = tuple(w for w in (first.weight, first.bias) if w is not None)
        ones *= _scale(original.q_a_layernorm, x, some, ready)
    return ones


def _scale(
    norm: Any, x: Tensor, layer: tuple[Tensor, ...], ready: Callable[[Tensor], Tensor]
) -> Tensor:
    size = functional.linear(x, *map(ready, layer)).square().mean()
    return (size + eps_of(norm, 1e-6)).sqrt()


def compression(module: nn.Module) -> tuple[Tensor, ...]:
    """Returns weight (and bias, if any) of what latent attention's values are made of."""
    original: Any = module.original_component
    project = original.kv_a_proj_with_mqa
    found = (project.weight, project.bias)
    return tuple(w[: original.kv_lora_rank] for w in found if w is not None)
