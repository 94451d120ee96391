"""Weights in half precision that take part in single-precision maths without being copied whole.

A product needs a weight in single precision only while it reads it. Stretches that fit the
processor's cache are converted one after the other and multiplied there, so that the weight is read
from memory once, in half precision, and takes no other memory. A copy of the whole weight costs
several times as much as the product itself for the few rows of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from torch import Tensor

from tl_contextmix.core.token_sums import blocks, multiply

STRETCH_BYTES = 2**22
"""Single-precision bytes of a stretch; smaller weights are copied."""
_DEVICE_STRETCH_BYTES = 2**28
"""The same on a GPU, which would wait for many small products."""
_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def in_precision(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in the dtype of the maths, on its device: itself, a copy, or `HalfWeight`.

    Args:
        weight: The weight; it is read when it is used.
        dtype: Dtype of the maths.
    """
    if weight.dtype not in _HALF or dtype == weight.dtype or isinstance(weight, HalfWeight):
        return weight.to(dtype)
    whole = 4 * weight.numel() <= STRETCH_BYTES or weight.ndim < 2 or weight.is_meta
    return weight.to(dtype) if whole else HalfWeight(weight, dtype)


def _described(weight: HalfWeight, *, tensor_contents: object = None) -> str:
    """Returns shape and dtypes; the numbers are the weight's."""
    del tensor_contents
    return f"HalfWeight({tuple(weight.shape)}, {weight.held.dtype} as {weight.dtype})"


class HalfWeight(Tensor):
    """A weight kept in half precision that other code sees in the dtype of the maths.

    Views of it are of the same kind, products convert it stretch by stretch, and what picks
    entries converts those. Anything else gets a copy.

    Attributes:
        held: The weight in half precision.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, dtype: torch.dtype) -> HalfWeight:
        """Returns a weight that says it has the dtype of the maths."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=dtype,
            device=held.device,
            storage_size=0,
        )
        made.held = held
        return made

    # By assignment: mypy reads the option of the tensor's own as one without a name.
    __repr__: Any = _described

    def whole(self) -> Tensor:
        """Returns a copy in the dtype of the maths."""
        return _converted(self.held, self.dtype)

    @classmethod
    @no_type_check
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator on the weight in half precision, where its result is the same."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _PRODUCTS and isinstance(args[1], HalfWeight):
            return _PRODUCTS[func](_plain(first), args[1].held)
        if func in _WITH_BIAS and isinstance(args[2], HalfWeight) and not kwargs:
            return _product(_plain(args[1]), args[2].held).add_(_plain(first))
        if func is _aten.mv.default and isinstance(first, HalfWeight):
            return _product(_plain(args[1])[None], first.held.t())[0]
        if func is _aten.mm.default and isinstance(first, HalfWeight):
            return _product(args[1].t(), first.held.t()).t().contiguous()
        if isinstance(first, HalfWeight) and not any(isinstance(x, HalfWeight) for x in args[1:]):
            if func.is_view or func in _COPIES:
                return _each(func(first.held, *args[1:], **kwargs), first.dtype)
            if func is _aten._to_copy.default and kwargs.get("dtype") == first.held.dtype:
                return func(first.held, **kwargs)
            if func in _PICKING:
                return func(first.held, *args[1:], **kwargs).to(first.dtype)
            if func in _MAKING:
                return func(first.held, *args[1:], **{"dtype": first.dtype, **kwargs})
        # Under inference mode operators that are made of others arrive here whole.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        return func(*map(_plain, args), **{name: _plain(one) for name, one in kwargs.items()})


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (a stretch of) a weight in the dtype of the maths."""
    return weight.to(dtype)


def _plain(value: Any) -> Any:
    """Returns an argument with weights as copies in the dtype of the maths."""
    if isinstance(value, HalfWeight):
        return value.whole()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


def _each(found: Any, dtype: torch.dtype) -> Any:
    """Returns views of a weight in half precision as weights."""
    if isinstance(found, (list, tuple)):
        return type(found)(HalfWeight(one, dtype) for one in found)
    return HalfWeight(found, dtype)


def _product(x: Tensor, held: Tensor) -> Tensor:
    """Returns ``x @ held`` in the precision of ``x``, of matrices."""
    inner, width = held.shape
    room = _room(x)
    if held.stride(0) <= held.stride(1):  # columns lie together
        out = x.new_empty(len(x), width)
        for part in blocks(width, max(1, room // max(1, inner))):
            out[:, part] = multiply(x, _converted(held[:, part], x.dtype))
        return out
    out = x.new_zeros(len(x), width)
    for part in blocks(inner, max(1, room // max(1, width))):
        out.addmm_(x[:, part], _converted(held[part], x.dtype))
    return out


def _products(x: Tensor, held: Tensor) -> Tensor:
    """Returns ``x @ held`` in the precision of ``x``, of batches of matrices."""
    if len(x) == 1:
        return _product(x[0], held[0])[None]
    out = x.new_empty(*x.shape[:2], held.shape[2])
    some = _room(x) // max(1, held.shape[1] * held.shape[2])
    for part in blocks(len(x), some):
        if some > 0:
            torch.bmm(x[part], _converted(held[part], x.dtype), out=out[part])
        else:
            out[part.start] = _product(x[part.start], held[part.start])
    return out


def _room(x: Tensor) -> int:
    """Returns how many numbers a stretch has."""
    size = STRETCH_BYTES if x.device.type == "cpu" else _DEVICE_STRETCH_BYTES
    return size // x.element_size()


_PRODUCTS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    _aten.mm.default: _product,
    _aten.bmm.default: _products,
}
_WITH_BIAS = {_aten.addmm.default}
_COPIES = {_aten.clone.default, _aten.contiguous.default, _aten._unsafe_view.default}
_PICKING = {
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.embedding.default,
    _aten.gather.default,
}
_MAKING = {
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
