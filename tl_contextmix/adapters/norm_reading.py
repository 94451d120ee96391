"""Reads norms, those of a bridge by what they make of random input."""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.errors import UnsupportedModel, four_parts

# Fitting a bridge's norm to a formula leaves rounding only: at most 2e-6 measured in float32 over
# the families of the test zoo, 4e-3 in bfloat16; a wrong formula is off by 0.1 and more.
_NORM_FIT = {torch.float64: 1e-5, torch.float32: 1e-4}
# Below this share of the tolerance no other formula is looked for.
_ROUNDING = 0.01
_FINAL_NORMS = {
    "decoder": ("ln_final", "decoder_ln_final", "decoder_final_ln"),
    "encoder": ("encoder_ln_final", "encoder_final_ln"),
}


def final_norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the module of the norm after the last block of each stack that has one.

    A masked-LM bridge calls the norm inside its head `ln_final`; that is not one of them.
    """
    modules = model._modules
    return {
        stack: module
        for stack, names in _FINAL_NORMS.items()
        for name in names
        if (module := modules.get(name)) is not None
        and not (name == "ln_final" and "mlm_head" in modules)
    }


def final_norms(handle: Handle, stacks: Collection[str]) -> dict[str, Norm]:
    """Returns the norm after the last block of each of the stacks that has one."""
    modules = final_norm_modules(handle.get())
    if list(stacks) == ["encoder"]:
        # A bidirectional HookedTransformer calls its norm as a causal one does.
        modules = dict(zip(stacks, modules.values(), strict=False))
    found = {stack: read_norm(module, handle) for stack, module in modules.items()}
    return {stack: norm for stack, norm in found.items() if norm is not None}


def block_norms(handle: Handle, block: nn.Module) -> dict[str, Norm | None]:
    """Returns the norms of a block, by the names of their modules."""
    return {
        name: read_norm(module, handle)
        for name, module in block._modules.items()
        if name.startswith("ln") and module is not None
    }


def read_norm(module: Any, handle: Handle) -> Norm | None:
    """Returns the norm a module computes; None for the identity.

    Raises:
        UnsupportedModel: If a bridge's norm is neither a LayerNorm nor an RMSNorm.
    """
    if handle.bridge:
        return _fit_norm(module.original_component, handle)
    kind = type(module).__name__
    if kind == "Identity":
        return None
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    return Norm(
        kind="rms" if kind.startswith("RMS") else "ln",
        weight=None if weight is None else handle.ready(weight),
        bias=None if bias is None else handle.ready(bias),
        eps=float(module.eps),
    )


def _fit_norm(module: nn.Module | None, handle: Handle) -> Norm | None:
    """Returns the norm that reproduces a Hugging Face module on random input.

    Neither class names nor config fields say reliably which formula it is: T5's RMSNorm calls
    itself LayerNorm, and Gemma's gain is 1 + weight. OLMo's has neither gain nor bias.
    """
    if module is None or isinstance(module, nn.Identity):
        return None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "eps", None)
    eps = float(getattr(module, "variance_epsilon", 1e-5) if eps is None else eps)
    like = next(handle.get().parameters()) if weight is None else weight
    width = int(handle.get().cfg.d_model) if weight is None else weight.shape[0]
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(3, width, generator=generator, device="cpu").to(like.device, like.dtype)
    with torch.no_grad():
        expected = handle.ready(module(x))
    x = handle.ready(x)
    bias = None if bias is None else handle.ready(bias)
    gains = [None] if weight is None else [handle.ready(weight), handle.ready(weight) + 1]
    tolerance, found = _NORM_FIT.get(like.dtype, 5e-2), []
    for norm in (Norm(kind, gain, bias, eps) for kind in ("ln", "rms") for gain in gains):
        found.append((float((norm(x) - expected).abs().max()), norm))
        if found[-1][0] <= _ROUNDING * tolerance:
            break
    error, best = min(found, key=itemgetter(0))
    if not error <= tolerance:
        raise _unknown_norm(module, error)
    return best


def _unknown_norm(module: nn.Module, error: float) -> UnsupportedModel:
    return UnsupportedModel(
        four_parts(
            f"the norm {type(module).__name__} cannot be read",
            f"an error of {error:.2g} against the nearest formula",
            "a LayerNorm or an RMSNorm over d_model",
            "Use a model with one of these.",
        )
    )
