"""What fails because of an argument's type ends in `InvalidInput`, for every public function.

Functions check what they are given by its meaning: a layer that is not there, a mask that does not
fit. What no function can use is found here, in one place and once a call has failed: an argument
of another type than its annotation says, or a text that is none. Calls that go well pay nothing
for it. Only numbers beyond 64 bits are refused before, as what counts up to them never ends.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from tl_contextmix.errors import ContextMixError, InvalidInput, bad

F = TypeVar("F", bound=Callable[..., Any])


def guarded(function: F) -> F:
    """Returns a function that raises InvalidInput where it failed over an argument's type."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(_is_huge, (*args, *kwargs.values()))):
            wrong = _found(function, args, kwargs, _too_large)
            if wrong is not None:
                raise _unusable(function, *wrong)
        try:
            return function(*args, **kwargs)
        except ContextMixError:
            raise
        except Exception as error:
            wrong = _found(function, args, kwargs, _misfit)
            if wrong is None:
                raise
            raise _unusable(function, *wrong) from error

    return typing.cast(F, call)


_Wrong = tuple[str, Any, str]


def _found(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrong: Callable[[Any, Any], str],
) -> _Wrong | None:
    """Returns name and value of the first argument that is wrong, and what was expected."""
    inner = inspect.unwrap(function)
    signature = inspect.signature(inner)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None  # Python's own words for missing and unknown arguments are the best
    hints = _hints(inner)
    for name, value in given.items():
        expected = wrong(value, hints.get(name, Any))
        if expected:
            annotation = signature.parameters[name].annotation
            return name, value, expected.format(annotation=annotation)
    return None


def _unusable(function: Callable[..., Any], name: str, value: Any, expected: str) -> InvalidInput:
    return bad(
        f"{function.__name__} cannot use this {name}",
        _seen(value),
        expected,
        f"See help({function.__name__}).",
    )


def _misfit(value: Any, hint: Any) -> str:
    """Returns what was expected where a value is not what its annotation says, else nothing."""
    if not _fits(value, hint):
        return "{annotation}"
    texts = [value] if isinstance(value, (str, os.PathLike)) else value
    if isinstance(texts, (list, tuple)) and not all(map(_is_text, texts)):
        return "characters that a text can have"
    return ""


def _too_large(value: Any, hint: Any) -> str:
    return "a number of at most 64 bits" if _is_huge(value) else ""


def _is_huge(value: Any) -> bool:
    return type(value) is int and not -(2**63) <= value < 2**63


def _is_text(value: Any) -> bool:
    """Returns whether a text, or path, can be written in UTF-8; anything else counts as one."""
    if not isinstance(value, (str, os.PathLike)):
        return True
    text = str(value)
    return "\0" not in text and text.isascii() | (text.encode(errors="ignore").decode() == text)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is what an annotation says, down to the items of containers."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is None:
        return _is_a(value, hint)
    if not isinstance(value, kind) or isinstance(value, (str, bytes)):
        return False
    if kind is collections.abc.Callable or not inner:
        return True
    if kind is tuple and inner[-1] is not ...:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if isinstance(value, collections.abc.Mapping):
        return all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return all(_fits(item, inner[0]) for item in value)


def _is_a(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Tensor):
        return isinstance(value, Tensor)
    return isinstance(value, hint)


def _seen(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # an object that cannot even be written out
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
