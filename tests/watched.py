"""PyTorch's operators, one by one, as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    """Shows each operator that runs, its arguments, and what it returns."""

    def __init__(self, see: Callable[[Any, Any, Any], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out


def operators(work: Callable[[], object]) -> list[Any]:
    """The operators that a piece of work takes."""
    seen: list[Any] = []
    with Watched(lambda func, args, out: seen.append(func)):
        work()
    return seen
