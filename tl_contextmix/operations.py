"""Counting what a computation costs, independent of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def count_operations(work: Callable[[], object]) -> int:
    """Returns the operations in products of matrices; a multiplication with an addition counts two.

    By the table of `torch.utils.flop_counter`, gradients included. Its own FlopCounterMode
    follows modules too and fails where code calls torch.autograd.grad (PyTorch 2.13).

    Args:
        work: Run once.
    """
    with _Counter() as counter:
        work()
    return counter.total


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = flop_registry.get(func._overloadpacket)
        if known is None:
            # Under inference mode operators that are made of others arrive here whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if known is not None:
            self.total += known(*args, **kwargs, out_val=out)
        return out
