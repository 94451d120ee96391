"""Reads mixtures of experts out of a TransformerBridge.

Hosts show what a mixture reads and writes, and hold its experts' weights in the modules of Hugging
Face. What a token is routed to is asked of the model's own router.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.recognition import inner
from tl_contextmix.core.activations import ACTIVATIONS, Activation, clamped, swish
from tl_contextmix.core.blocks import EditPoints, FeedForward
from tl_contextmix.core.experts import Experts, Router

_SHARED = ("shared_expert", "shared_experts")
_ROUTERS = ("gate", "router")
# How the layers of a dense expert are called.
_LAYERS = {"gate": ("gate_proj",), "in": ("up_proj", "wi"), "out": ("down_proj", "wo")}
# What experts compute, relative to what their module does.
_FIT = {torch.float64: 1e-5, torch.float32: 1e-4}
# An activation that is a named one differs from it by rounding.
_SAME = 1e-6


def has_experts(module: nn.Module) -> bool:
    """Whether a feed-forward module is a mixture of experts."""
    return getattr(inner(module), "experts", None) is not None


def read_experts(
    handle: Any,
    here: str,
    edits: EditPoints,
    module_of: Callable[[Tensor], Tensor],
    dense_path: str = "",
) -> Experts | None:
    """Returns the experts of a feed-forward module; None where they do not compute what it does.

    Routers and experts of unknown classes may want other arguments, and hold other weights.
    ``module_of`` calls the module; ``dense_path`` is that of a layer that every token goes through,
    too.
    """
    try:
        found = _experts(handle, here, edits, dense_path)
        return found if found is not None and _same(handle, found, module_of) else None
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def _experts(handle: Any, here: str, edits: EditPoints, dense_path: str) -> Experts | None:
    module = inner(handle.get().get_submodule(here))
    router = next((name for name in _ROUTERS if getattr(module, name, None) is not None), None)
    held = inner(module.experts)
    if not handle.bridge or router is None:
        return None
    blank = FeedForward("", "", "", weights=lambda name: None)
    routed = list(_routed(handle, here, held, blank))
    shared = [name for name in _SHARED if getattr(module, name, None) is not None]
    experts = (*routed, *(_dense(handle, here, name, blank) for name in shared))
    if dense_path:
        shared.append(dense_path)
        experts = (*experts, replace(blank, weights=handle.weights(dense_path)))
    probe = torch.zeros(1, 2, _width(handle), dtype=handle.dtype, device=handle.device)
    route = _route(handle, here, router, len(routed), shared)
    activation = _activation(held)
    scales_input = type(held).__name__ == "Llama4TextExperts"
    bounds = (1 - float(held.limit), 1 + float(held.limit)) if _limited(held) else None
    how: dict[str, Any] = {"activation": activation, "scales_input": scales_input, "bounds": bounds}
    experts = tuple(replace(expert, **how) for expert in experts)
    return Experts(
        pre=f"{here}.hook_in",
        post=f"{here}.hook_in",
        pre_linear=None,
        weights=partial(_of_all, experts),
        activation=activation,
        edits=edits,
        experts=experts,
        router=route,
        written=f"{here}.hook_out",
        sizes=tuple(expert.width for expert in experts),
        active=int((route(probe) != 0).sum(-1).max()),
        d_model=_width(handle),
    )


def _same(handle: Any, found: Experts, module_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether experts compute what their module does, of random input."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    dtype = next(handle.get().parameters()).dtype
    x = torch.randn(1, 4, found.d_model, generator=generator, device="cpu").to(dtype)
    x = handle.ready(x)
    with torch.no_grad():
        expected, computed = module_of(x), found.compute(x)
    error = float((computed - expected).abs().max() / expected.abs().max())
    return error <= _FIT.get(dtype, 5e-2)


def _width(handle: Any) -> int:
    return int(handle.get().cfg.d_model)


def _of_all(experts: tuple[FeedForward, ...], name: str) -> Tensor | None:
    """Returns a weight of all experts, side by side on the neuron axis."""
    every = [] if name == "b_out" else [expert.weights(name) for expert in experts]
    found = [one for one in every if one is not None]
    if not found:
        return None
    return torch.cat(found, dim=1 if name in ("W_in", "W_gate") else 0)


def _module(handle: Any, here: str, path: str) -> Any:
    result = inner(handle.get().get_submodule(here))
    for name in path.split("."):
        result = inner(result.get_submodule(name))
    return result


def _routed(handle: Any, here: str, held: Any, blank: FeedForward) -> Iterator[FeedForward]:
    """Yields the experts among which the router chooses: mostly they are held in one tensor."""
    if isinstance(held, nn.ModuleDict):
        for name in held:
            yield _dense(handle, here, f"experts.{name}", blank)
        return
    for number in range(len(held.gate_up_proj)):
        yield replace(blank, weights=partial(_fused, handle, here, number))


def _dense(handle: Any, here: str, path: str, blank: FeedForward) -> FeedForward:
    """Returns an expert that is a module of its own, such as one that every token goes through."""

    def read(name: str) -> Tensor | None:
        return _linear(handle, _module(handle, here, path), name)

    return replace(blank, weights=read, pre_linear="" if read("W_gate") is not None else None)


def _linear(handle: Any, module: Any, name: str) -> Tensor | None:
    kind, _, leaf = name.partition("_")
    layer = next((name for name in _LAYERS.get(leaf, ()) if hasattr(module, name)), None)
    if layer is None:
        return None
    linear = inner(getattr(module, layer))
    weight = linear.weight.T if kind == "W" else linear.bias
    return None if weight is None else handle.ready(weight)


def _fused(handle: Any, here: str, number: int, name: str) -> Tensor | None:
    """Returns a weight of one of the experts that are held in one tensor."""
    held = _module(handle, here, "experts")
    kind, _, leaf = name.partition("_")
    layer = {"in": "gate_up_proj", "gate": "gate_up_proj", "out": "down_proj"}.get(leaf, "")
    every = getattr(held, layer if kind == "W" else f"{layer}_bias", None)
    if every is None:
        return None
    transposed = getattr(held, "is_transposed", None)
    if transposed is None:
        transposed = held.gate_up_proj.shape[1] == _width(handle)
    found = every[number] if kind == "b" or transposed else every[number].T
    if leaf != "out":
        together = getattr(held, "is_concatenated", True)
        gate, up = found.chunk(2, dim=-1) if together else (found[..., ::2], found[..., 1::2])
        found = gate if leaf == "gate" else up
    found = handle.ready(found)
    return found + 1 if _limited(held) and name == "b_in" else found


def _limited(held: Any) -> bool:
    """Whether experts compute ``(up + 1) gate sigmoid(alpha gate)`` of inputs within a limit."""
    return hasattr(held, "_apply_gate") and hasattr(held, "alpha") and hasattr(held, "limit")


def _activation(held: Any) -> Activation:
    """Returns the experts' activation, by name where a named one is the same."""
    if _limited(held):
        return clamped(swish(float(held.alpha)), float(held.limit))
    one: Any = next(iter(held.values())) if isinstance(held, nn.ModuleDict) else held
    function = one.act if hasattr(one, "act") else one.act_fn
    line = torch.linspace(-8, 8, 101, dtype=torch.float64)
    with torch.no_grad():
        seen = function(line)
        found = min(ACTIVATIONS, key=lambda one: float((one(line) - seen).abs().max()))
        close = float((found(line) - seen).abs().max()) < _SAME
    return found if close else Activation("host", function, kink=True)


def _route(handle: Any, here: str, router: str, count: int, shared: list[str]) -> Router:
    """Returns the function that asks the model's own router for the gain of every expert."""

    def route(x: Tensor) -> Tensor:
        module = inner(handle.get().get_submodule(here))
        gate, own = (inner(getattr(module, n, None)) for n in (router, "shared_expert_gate"))
        like = next(module.parameters())
        flat = x.reshape(-1, x.shape[-1]).to(like.device, like.dtype)
        # Switch Transformers count how many tokens of a text go to each expert: one is never many.
        each = flat[:, None] if hasattr(gate, "expert_capacity") else flat
        with torch.no_grad():
            # What a router takes besides its input is what its mixture holds by that name.
            further = [*inspect.signature(gate.forward).parameters][1:]
            given = [getattr(module, name) for name in further if hasattr(module, name)]
            gains = handle.ready(_gains(gate(each, *given), len(flat), count))
            always = gains.new_ones(len(flat), len(shared))
            if own is not None:
                always = handle.ready(own(flat).sigmoid())
        return torch.cat([gains, always], dim=1).view(*x.shape[:-1], -1)

    return route


def _gains(found: Any, tokens: int, count: int) -> Tensor:
    """Returns the gain of every expert [token expert], of what a router returns."""
    if len(found) == 2:  # Llama 4: a sigmoid for every expert, zero where it is not chosen
        return found[0]
    if not found[0].is_floating_point():  # Switch: where it goes, and how probable that was
        return (found[0] * found[1])[:, 0]
    _, weights, chosen = found
    return weights.new_zeros(tokens, count).scatter(
        1, chosen.view(tokens, -1), weights.view(tokens, -1)
    )
