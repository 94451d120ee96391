"""Counting what a computation costs, independent of the machine: operations done, bytes held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, no_type_check

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def count_operations(work: Callable[[], object]) -> int:
    """Returns the operations in products of matrices; a multiplication with an addition counts two.

    By the table of `torch.utils.flop_counter`, gradients included. Its own FlopCounterMode
    follows modules too and fails where code calls torch.autograd.grad (PyTorch 2.13).

    Args:
        work: Run once.
    """
    with Operations() as counter:
        work()
    return counter.total


class Operations(TorchDispatchMode):
    """Counts the operations done while it is active; see `count_operations`.

    Attributes:
        table: What a call of each operator takes.
        total: The operations so far.
    """

    table: ClassVar[Mapping[Any, Callable[..., int]]] = flop_registry

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and adds what it costs."""
        kwargs = kwargs or {}
        known = self.table.get(func._overloadpacket)
        if known is None and func is not torch.ops.prim.device.default:
            # Under inference mode operators that are made of others arrive here whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if known is not None:
            self.total += known(*args, **kwargs, out_val=out)
        return out


class Memory(TorchDispatchMode):
    """Follows the storage of every tensor that is made while it is active.

    Views are no new storage. What an operator allocates inside of itself and frees again is not
    seen; for the code measured here PyTorch's CPU allocator reported the same peaks to the byte.

    Attributes:
        live: Bytes alive now, of tensors made since the meter was started.
        peak: The most there were at once.
        largest: Bytes of the largest one.
        beside: Bytes that are said to be held besides, and count as alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = self.beside = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes the storages that are new."""
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                # A weak reference keeps the address from being used again.
                self._given.setdefault(storage._cdata, StorageWeakRef(storage))
        out = func(*args, **(kwargs or {}))
        self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = self.beside + sum(size for _, size in self._made.values())
        self.peak = max(self.peak, self.live)
        return out


@no_type_check
def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
