"""Reads norms, of the stream and of heads; those of a bridge by what they make of random input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.recognition import eps_of
from tl_contextmix.core.score_forms import HeadNorm
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.errors import UnsupportedModel

# Fitting a norm to a formula leaves rounding only: at most 2e-6 measured in float32 over
# the families of the test zoo, 4e-3 in bfloat16; a wrong formula is off by about 0.1 of the gain.
_NORM_FIT = {torch.float64: 1e-5, torch.float32: 1e-4}
_HALF_FIT = 5e-2
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
    like = next(handle.get().parameters()) if weight is None else weight
    width = int(handle.get().cfg.d_model) if weight is None else weight.shape[0]
    x = _random((3, width), like)
    with torch.no_grad():
        expected = handle.ready(module(x))
    bias = None if bias is None else handle.ready(bias)
    gains = [None] if weight is None else [handle.ready(weight), handle.ready(weight) + 1]
    eps = eps_of(module, 1e-5)
    error, norm = _nearest(handle.ready(x), expected, gains, bias, eps)
    if error <= _NORM_FIT.get(like.dtype, _HALF_FIT):
        return norm
    raise UnsupportedModel(
        f"the norm {type(module).__name__} cannot be read",
        f"an error of {error:.2g} against the nearest formula",
        "a LayerNorm or an RMSNorm over d_model",
        "Use a model with one of these.",
    )


def read_head_norm(
    attention: nn.Module, side: str, width: Callable[[], int], dtype: torch.dtype
) -> HeadNorm | None:
    """Returns the norm of queries (``"q"``) or keys (``"k"``) of an attention module.

    None where there is none, or none that is known: scores are then no bilinear form of what their
    heads read, which is seen where somebody asks for one. ``width`` returns that of a head.
    """
    inside: Any = getattr(attention, "original_component", None)
    every = {**getattr(inside, "_modules", {}), **attention._modules}
    module: Any = every.get(f"{side}_norm") or every.get("qk_norm")
    module = getattr(module, "original_component", None) or module
    if module is None:
        return None
    each = module._modules.get("norms")
    first = module if each is None else each[0]
    if getattr(first, "bias", getattr(first, "b", None)) is not None:
        return None
    d_head = width()
    gains = [getattr(one, "weight", getattr(one, "w", None)) for one in (each or [module])]
    known = [gain.detach() for gain in gains if gain is not None]
    if not known:  # nanochat, Llama 4
        like = next(attention.parameters())
        known = [torch.ones(d_head, dtype=like.dtype, device=like.device)]
    weight = known[0] if each is None else torch.stack(known)
    x = _random((1, *weight.shape), weight)
    with torch.no_grad():
        # Where each head has its own, heads are the second axis, in front of positions.
        expected = module(x) if each is None else module(x[:, :, None])[:, :, 0]
    gain, eps = weight.to(dtype), eps_of(first, torch.finfo(torch.float32).eps)
    error, norm = _nearest(x.to(dtype), expected.to(dtype), [gain, gain + 1], None, eps)
    together = weight.ndim == 1 and len(weight) > d_head
    if not error <= _NORM_FIT.get(weight.dtype, _HALF_FIT) or (together and norm.kind == "ln"):
        return None  # of LayerNorm, the mean over all heads is no head's own
    assert norm.weight is not None
    return HeadNorm(replace(norm, weight=None), norm.weight.view(-1, d_head), together)


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(like.device, like.dtype)


def _nearest(
    x: Tensor, expected: Tensor, gains: Sequence[Tensor | None], bias: Tensor | None, eps: float
) -> tuple[float, Norm]:
    """Returns the norm that is closest to a module's output, and how far it is from it.

    All are tried: where gains are small, all are close.
    """
    norms = [Norm(kind, gain, bias, eps) for kind in ("ln", "rms") for gain in gains]
    errors = [float((norm(x) - expected).abs().max()) for norm in norms]
    return min(zip(errors, norms, strict=True), key=itemgetter(0))
