"""Modules that users put where hook points were, such as the SAEs of SAELens."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tl_contextmix.adapters.recognition import every_module


@functools.cache
def hook_point() -> type[nn.Module]:
    """Returns TransformerLens' class, which is imported with the first model."""
    return importlib.import_module("transformer_lens.hook_points").HookPoint


@functools.cache
def around_point() -> type[nn.Module]:
    """Returns the class of hook points that compute what a spliced module does."""

    class Around(hook_point()):
        def forward(self, *given: Any, **named: Any) -> Any:
            return self.__dict__["spliced"](*given, **named)

    return Around


class _Heads:
    """How a bridge shows activations of all heads side by side: head by head."""

    def __init__(self, width: int) -> None:
        self.width, self.flat = width, False

    def convert(self, activation: Tensor) -> Tensor:
        """Returns it by head."""
        self.flat = activation.ndim == 3
        return activation.unflatten(-1, (-1, self.width)) if self.flat else activation

    def revert(self, activation: Tensor) -> Tensor:
        """Returns it as the host computes with it."""
        return activation.flatten(2) if self.flat else activation


def find_splices(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of modules where hook points were: SAEs that SAELens attached."""
    if not any(
        _spliced(name, child)
        for parent in every_module(model)
        for name, child in parent._modules.items()
    ):
        return ()
    found: list[str] = []
    seen: list[nn.Module] = []  # and what is inside of them
    for path, parent in named(model):
        if isinstance(parent, hook_point()) or any(parent is one for one in seen):
            continue
        for name, child in parent._modules.items():
            if child is not None and _spliced(name, child):
                found.append(f"{path}.{name}" if path else name)
                seen += child.modules()
    return tuple(found)


def _spliced(name: str, child: nn.Module | None) -> bool:
    return name.startswith("hook_") and not isinstance(child, (hook_point(), type(None)))


def named(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module under the name that hooks have for it.

    A bridge's modules are those of the model it wraps, too, under other names: its own come first.
    """
    seen = set() if seen is None else seen
    seen.add(id(module))
    yield path, module
    children = [*module._modules.items()]
    if "_original_component" in module._modules:
        children.sort(key=lambda pair: pair[0] == "_original_component")
    for name, child in children:
        if child is not None and id(child) not in seen:
            yield from named(child, f"{path}.{name}" if path else name, seen)


@contextmanager
def stand_ins(model: Any, splices: Sequence[str], *, around: bool) -> Iterator[None]:
    """Puts hook points where modules are spliced in, for a while.

    With ``around``, the hook points compute what the modules do; else they are plain ones.
    """
    registry = model.__dict__.get("_hook_registry")
    table: dict[str, Any] = model.hook_dict if registry is None else registry
    places = []
    for path in splices:
        parent, _, name = path.rpartition(".")
        own = model.get_submodule(parent)._modules
        places.append((path, own, name, own[name], table.get(path)))
    try:
        for path, own, name, module, _ in places:
            point: Any = around_point()() if around else hook_point()()
            point.name = path
            if around:
                point.__dict__["spliced"] = module
            found = re.fullmatch(r"(.+)\.(?:[qkv]\.hook_out|o\.hook_in)", path)
            if registry is not None and found is not None:
                point.hook_conversion = _Heads(model.get_submodule(found[1]).W_O.shape[1])
            own[name] = table[path] = point
        yield
    finally:
        for path, own, name, module, before in places:
            own[name], table[path] = module, before
            if before is None:
                del table[path]
