"""Runs code without computing the data of large tensors, to count its FLOPs and bytes.

A method's work hardly depends on the data, so it can run on fake tensors. Small tensors, integers
and booleans stay real, because sizes, masks and loops depend on them. Code that reads a missing
number gets what normal activations would give: no difference, nothing to correct, all finite.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Tensors up to this size stay real: vectors, single weights, small tables.
_SMALL = 4096
_TRUE = "_true_in_a_dry_run"


class DryRun(TorchDispatchMode):
    """While active, large floating-point tensors have a shape but no data.

    Start counters after it, so that they see operators first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def without_numbers(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a fake tensor with the dtype and device of another."""
        with self._fake:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator on shapes, or for real if all tensors are small or not floats."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            return self._on_shapes(func, args, kwargs)
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        if any(tensor.dtype == torch.bool for tensor in given) and func in _INDEXING:
            args = _with_places(args)
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except RuntimeError:  # operators with a data-dependent output shape
            return func(*args, **kwargs)
        kept = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(map(_is_large, kept)):
            return out
        out = func(*args, **kwargs)
        # Writes of fake tensors leave it unchanged, so it must be initialized.
        return out.zero_() if func.overloadpacket in _EMPTY else out

    @no_type_check
    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            return args[0]  # a small real tensor keeps its data
        if func in _INDEXING:
            args = _with_places(args)
        with self._fake:
            out = func(*args, **kwargs)
        if func.overloadpacket is _aten.all:
            setattr(out, _TRUE, True)
        return out


@no_type_check
def _is_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > _SMALL


_EMPTY = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


def _with_places(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns indexing arguments with masks converted to indices."""
    places: list[Tensor | None] = []
    for index in args[1]:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool
        if not masks:
            places.append(index)
        elif isinstance(index, FakeTensor):  # nothing to correct
            places += [torch.empty(0, dtype=torch.long, device=index.device)] * index.ndim
        else:
            places += index.nonzero(as_tuple=True)
    return (args[0], places, *args[2:])


@no_type_check
def _number(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return getattr(tensor, _TRUE, False)
    return 0.0 if tensor.is_floating_point() else 0


def _one_value(
    tensor: Tensor, sorted: bool = True, inverse: bool = False, counts: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.zeros(1, dtype=torch.long, device=tensor.device)
    places = torch.zeros(tensor.shape, dtype=torch.long, device=tensor.device)
    return nothing.to(tensor.dtype), places, nothing + tensor.numel()


def _nowhere(tensor: Tensor) -> Tensor:
    return torch.empty(0, tensor.ndim, dtype=torch.long, device=tensor.device)


def _touched(tensor: Tensor, number: Any) -> Tensor:
    return torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)


_ANSWERS = {
    torch.ops.prim.device.default: lambda tensor: tensor.fake_device,
    _aten._local_scalar_dense.default: _number,
    _aten.equal.default: lambda *args: True,
    _aten.nonzero.default: _nowhere,
    _aten._unique2.default: _one_value,
    # Nonzero entries of a copied attention pattern: all of them.
    _aten.ne.Scalar: _touched,
}
