"""Running code on shapes alone: large tensors stand on PyTorch's meta device and have no numbers.

What a method and a model do hardly depends on numbers, so both can run over tensors that have none.
Small tensors, integers and booleans stay real: sizes, masks and loops depend on them. Where code
asks for a number that is not there it gets the answer that healthy activations give: no difference,
nothing to correct, everything finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
# Real numbers up to here: vectors, single weights, tables of a few entries.
_SMALL = 4096
_TRUE = "_true_on_shapes"


class OnShapes(TorchDispatchMode):
    """While it is active, large tensors of floating-point numbers have a shape and no numbers.

    Counters have to be started after it: they then see the operator before it does.

    Args:
        device: Where such tensors say that they are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._small = _Device(device), _SMALL
        self._known: dict[Any, tuple[Any, list[tuple]]] = {}

    @contextmanager
    def throughout(self) -> Iterator[None]:
        """Keeps no numbers of small tensors either: no pass mixes some with none."""
        self._small = 0
        try:
            yield
        finally:
            self._small = _SMALL

    @no_type_check
    def __enter__(self) -> OnShapes:
        """Starts it."""
        self._device.__enter__()
        return super().__enter__()

    @no_type_check
    def __exit__(self, *error: object) -> None:
        """Ends it."""
        super().__exit__(*error)
        self._device.__exit__(*error)

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator on shapes, or for real where everything is small or no fraction."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shapes = any(_is_meta(tensor) for tensor in tensors)
        if not shapes and (func.is_view or func._schema.is_mutable):
            return func(*args, **kwargs)
        if shapes and func in _ANSWERS:
            return _still_true(func, _ANSWERS[func](*args, **kwargs), tensors)
        if shapes and func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
            return args[0]  # a small real tensor keeps the numbers it has
        try:
            out = self._on_meta(func, args, kwargs)
        except RuntimeError:  # the shape of the result depends on numbers
            if shapes:
                raise
            return func(*args, **kwargs)
        if shapes:
            return _still_true(func, out, tensors)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(leaf.is_floating_point() and leaf.numel() > self._small for leaf in made):
            return out
        out = func(*args, **kwargs)
        # Shapes that are written to it later leave it as it is: it must not be just anything.
        return out.zero_() if func.overloadpacket in _EMPTY else out

    @no_type_check
    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of an operator on shapes; of those that were there before, a copy."""
        if func in _INDEXING:
            args = _with_places(args)
        key = _shapes((func, args, tuple(kwargs.items())))
        if key in self._known:
            kind, made = self._known[key]
            made = [torch.empty_strided(*sizes, dtype=t, device="meta") for *sizes, t in made]
            return made[0] if kind is None else kind(made)
        args, kwargs = tree_map_only(Tensor, _meta, (args, kwargs))
        if "device" in kwargs or func in _FACTORIES:
            kwargs["device"] = "meta"
        out = func(*args, **kwargs)
        kind = type(out) if isinstance(out, (tuple, list)) else None
        made = [out] if kind is None else out
        aliases = func.is_view or func._schema.is_mutable or func is _aten._unsafe_view.default
        if not aliases and all(isinstance(one, Tensor) for one in made):
            self._known[key] = (kind, [(x.size(), x.stride(), x.dtype) for x in made])
        return out


class _Device(TorchFunctionMode):
    """Hides the meta device: code makes tensors of its own beside those it is given."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._real = device

    @no_type_check
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function."""
        if func == _DEVICE:
            device = func(*args)
            return self._real if device.type == "meta" else device
        if func in _TO_HOST and args[0].is_meta:
            with _disable_current_modes():
                real = torch.full(args[0].shape, _number(args[0]), dtype=args[0].dtype)
                return func(real, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_DEVICE = Tensor.device.__get__
_TO_HOST = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


@no_type_check
def _shapes(value: Any) -> Any:
    """Returns what the shape of a result depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return type(value), value


@no_type_check
def _meta(tensor: Tensor) -> Tensor:
    if _is_meta(tensor):
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


@no_type_check
def _still_true(func: Any, out: Any, tensors: list[Tensor]) -> Any:
    """Returns a result, marked where it says that everything is as it should be."""
    packet = func.overloadpacket
    moved = packet in _MOVED and all(hasattr(tensor, _TRUE) for tensor in tensors)
    if packet is _aten.all or moved:
        setattr(out, _TRUE, True)
    return out


@no_type_check
def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


_EMPTY = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided}
_MOVED = {_aten._to_copy, _aten.cat, _aten.stack}
_FACTORIES = {
    overload
    for name in ("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "zeros")
    for packet in (getattr(_aten, name),)
    for overload in (getattr(packet, each) for each in packet.overloads())
}
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
        elif index.is_meta:  # nothing to correct: nowhere
            places += [torch.empty(0, dtype=torch.long, device="meta")] * index.ndim
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
    places = torch.zeros(tensor.shape, dtype=torch.long)
    return torch.zeros(1, dtype=tensor.dtype), places, torch.tensor([tensor.numel()])


def _to(tensor: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    if dtype in (None, tensor.dtype):
        return _aten.alias.default(tensor)  # it is where it should be, so nothing is copied
    return torch.empty_like(tensor, dtype=dtype)


_ANSWERS = {
    _aten._local_scalar_dense.default: _number,
    _aten._to_copy.default: _to,
    _aten.equal.default: lambda *args: True,
    _aten.nonzero.default: lambda tensor: torch.empty(0, tensor.ndim, dtype=torch.long),
    _aten._unique2.default: _one_value,
    # On shapes, PyTorch takes bfloat16 alone.
    _aten._grouped_mm.default: lambda rows, matrices, *others, **options: rows.new_empty(
        rows.shape[0], matrices.shape[-1]
    ),
    # What of an attention pattern is not zero, where the pattern was copied: all of it.
    _aten.ne.Scalar: lambda tensor, number: torch.ones(tensor.shape, dtype=torch.bool),
}
