"""Running code for its operations and bytes alone: numbers in large tensors are never computed.

What a method does with a model's numbers hardly depends on them, so it can be run over tensors
that have a shape and nothing else. Small tensors, integers and booleans stay real: sizes, masks
and loops depend on them. Where code asks for a number that is not there it gets the answer that
healthy activations give: no difference, nothing to correct, everything finite.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Real numbers up to here: vectors, single weights, tables of a few entries.
_SMALL = 4096
_TRUE = "_true_in_a_dry_run"


class DryRun(TorchDispatchMode):
    """While it is active, large tensors of floating-point numbers have a shape and no numbers.

    Counters have to be started after it: they then see the operator before it does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def without_numbers(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a tensor of a dtype and device of another, without numbers."""
        with self._fake:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator on shapes, or for real where everything is small or no fraction."""
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
        except RuntimeError:  # operators whose result has no shape before it is computed
            return func(*args, **kwargs)
        kept = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(map(_is_large, kept)):
            return out
        out = func(*args, **kwargs)
        # Shapes that are written to it later leave it as it is: it must not be just anything.
        return out.zero_() if func.overloadpacket in _EMPTY else out

    @no_type_check
    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            return args[0]  # a small real tensor keeps the numbers it has
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
    """Returns arguments of an indexing in which masks have become the places they are true at."""
    places: list[Tensor | None] = []
    for index in args[1]:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool
        if not masks:
            places.append(index)
        elif isinstance(index, FakeTensor):  # nothing to correct: nowhere
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
    # What of an attention pattern is not zero, where the pattern was copied: all of it.
    _aten.ne.Scalar: _touched,
}
