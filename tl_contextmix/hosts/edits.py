"""Hooks of the user's own: where they are, and how to read a model as it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Bridges and transformers keep recording hooks of their own on a model, PyTorch computes pruned or
# normalised weights in one, and a pass of ours may be under way whose hooks let others go by.
_HOSTS = {"transformer_lens", "transformers", "torch", "accelerate", "tl_contextmix"}


def hooked_places(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules that carry hooks of the user's own."""
    return tuple(
        name or type(model).__name__ for name, module in model.named_modules() if is_hooked(module)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a module itself carries a hook of the user's own."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False  # nearly all of them
    return any(not _of_host(hook) for table in _tables(module) for hook in table.values())


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


def _tables(module: nn.Module) -> Iterator[Any]:
    yield module._forward_hooks
    yield module._forward_pre_hooks


def _of_host(hook: Callable[..., Any]) -> bool:
    owner = getattr(_inner(hook), "__module__", None) or ""
    return owner.split(".")[0] in _HOSTS


def _inner(hook: Callable[..., Any]) -> Any:
    """Returns the function a HookPoint was given, which it wraps in one of its own."""
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = getattr(hook, "__closure__", None) or ()
    return next(
        (cell.cell_contents for name, cell in zip(names, cells, strict=True) if name == "hook"),
        hook,
    )
