"""Hooks of the user's own: where they are, and how to read a model as it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Bridges and transformers keep recording hooks of their own on a model, PyTorch computes pruned or
# normalised weights in one, and a pass of ours may be under way whose hooks let others go by.
_HOSTS = {"transformer_lens", "transformers", "torch", "accelerate", "tl_contextmix"}


def hooked_places(model: nn.Module, *, backward: bool = False) -> tuple[str, ...]:
    """Returns the names of the modules that carry hooks of the user's own.

    Args:
        model: The model.
        backward: Whether hooks of backward passes count, too.
    """
    return tuple(
        name or type(model).__name__
        for name, module in model.named_modules()
        if is_hooked(module)
        or (backward and _any_own((module._backward_hooks, module._backward_pre_hooks)))
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a module itself carries a hook of the user's own, which sees forward passes."""
    return _any_own(_tables(module))


def _any_own(tables: Iterable[dict[int, Callable[..., Any]]]) -> bool:
    return any(not _of_host(hook) for table in tables for hook in table.values())


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes the user's own hooks off for a while; their order is kept."""
    taken = [
        (table, dict(table))
        for module in model.modules()
        for table in _tables(module)
        if any(not _of_host(hook) for hook in table.values())
    ]
    try:
        for table, before in taken:
            for key, hook in before.items():
                if not _of_host(hook):
                    del table[key]
        yield
    finally:
        for table, before in taken:
            added = {key: hook for key, hook in table.items() if key not in before}
            # The tables themselves stay: handles for removal refer to them.
            table.clear()
            table.update({**before, **added})


def _tables(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _of_host(hook: Callable[..., Any]) -> bool:
    owner = getattr(_inner(hook), "__module__", None) or ""
    return owner.split(".")[0] in _HOSTS


def _inner(hook: Callable[..., Any]) -> Any:
    """Returns the function a HookPoint was given, which it wraps in functions of its own."""
    names: tuple[str, ...] = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = getattr(hook, "__closure__", None) or ()
    held = dict(zip(names, cells, strict=True))
    if "hook" in held:
        return held["hook"].cell_contents
    if "full_hook" in held:  # that of a backward pass is wrapped twice
        return _inner(held["full_hook"].cell_contents)
    return hook
