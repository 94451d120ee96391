"""Norms of queries and keys, in whatever shape a host holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.core.score_forms import HeadNorm
from tl_contextmix.core.token_sums import Norm

# As for norms of the stream: rounding leaves at most 2e-6, another formula 0.1 and more.
_FIT = {torch.float64: 1e-5, torch.float32: 1e-4}


def read_head_norm(
    attention: nn.Module, side: str, width: Callable[[], int], dtype: torch.dtype
) -> HeadNorm | None:
    """Returns the norm of queries (``"q"``) or keys (``"k"``) of an attention module.

    None where there is none, or none that is known: scores are then no bilinear form of what their
    heads read, which is seen where somebody asks for one.

    Args:
        attention: The module.
        side: Which.
        width: Returns the width of its heads.
        dtype: Dtype of the maths.
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
    gain = known[0] if each is None else torch.stack(known)
    return _fit(module, _eps(first), gain, d_head, dtype)


def _eps(module: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        if getattr(module, name, None) is not None:
            return float(getattr(module, name))
    return torch.finfo(torch.float32).eps


def _fit(
    module: nn.Module, eps: float, gain: Tensor, d_head: int, dtype: torch.dtype
) -> HeadNorm | None:
    """Returns the norm that reproduces a module on random input; None for none."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(1, *gain.shape, generator=generator, device="cpu").to(gain.device, gain.dtype)
    together = gain.ndim == 1 and len(gain) > d_head
    by_head = "norms" in module._modules  # heads are its second axis, in front of positions
    with torch.no_grad():
        expected = module(x[:, :, None])[:, :, 0] if by_head else module(x)
    expected, x = expected[0].to(dtype), x[0].to(dtype)
    for kind in ("rms", "ln"):
        for more in (0, 1):  # Gemma's gain is 1 + weight
            norm = Norm(kind, None, None, eps)
            own = gain.to(dtype) + more
            found = norm(x) * own
            if float((found - expected).abs().max()) <= _FIT.get(gain.dtype, 5e-2):
                if together and kind == "ln":
                    return None  # the mean over all heads is no head's own
                return HeadNorm(norm, own.view(-1, d_head), together)
    return None
