"""Counting what a computation costs, independent of the machine: operations done, bytes held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, no_type_check

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tl_contextmix.core.token_sums import ONEDNN


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


def _rows(rows: Tensor, matrices: Tensor, *others: Any, **options: Any) -> int:
    """Returns the operations of rows that are each multiplied with a matrix, of one or several."""
    return 2 * rows.shape[0] * matrices.shape[-2] * matrices.shape[-1]


def _linear(rows: Tensor, matrix: Tensor, *others: Any, **options: Any) -> int:
    """Returns the operations of `ONEDNN`."""
    return 2 * rows.numel() * matrix.shape[0]


class Operations(TorchDispatchMode):
    """Counts the operations done while it is active; see `count_operations`.

    Attributes:
        table: What a call of each operator takes.
        total: The operations so far.
    """

    # Experts multiply each token with matrices of its own. PyTorch's table has neither this nor
    # the products of oneDNN.
    table: ClassVar[Mapping[Any, Callable[..., int]]] = {
        **flop_registry,
        torch.ops.aten._grouped_mm: _rows,
        **({} if ONEDNN is None else {ONEDNN: _linear}),
    }

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
    seen, nor what oneDNN lays out for itself; for the code measured here PyTorch's CPU allocator
    reported the same peaks to the byte otherwise.

    Attributes:
        live: Bytes alive now, of tensors made since the meter was started.
        peak: The most there were at once.
        largest: Bytes of the largest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.ref] = {}

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes the storages that are new."""
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._note(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live += size
            self.largest = max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


@no_type_check
def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [tensor.untyped_storage() for tensor in tensors]
