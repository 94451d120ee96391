"""Everything this package raises or warns with.

Every message has four parts: what failed, the value seen, what was expected, what to do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent)


class ContextMixError(Exception):
    """Base class of every error this package raises on purpose: a message, or its four parts."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*map(str, parts))

    def __str__(self) -> str:
        return _message(self.args)


class InvalidInput(ContextMixError, ValueError):
    """The call is wrong: an argument, a token, a mask or a cache cannot be used as given."""


class UnknownOption(InvalidInput, TypeError):
    """A function has no option of this name."""


class UnsupportedModel(ContextMixError, NotImplementedError):
    """The model is not one whose numbers would be right, so none are given."""


class FileFormatError(ContextMixError, ValueError):
    """A file is not a result of this package, or one this version cannot read."""


class ContextMixWarning(UserWarning):
    """The answer is right, but means something else than the reader may think."""


def warn(*parts: Any) -> None:
    """Gives a `ContextMixWarning` about the line that called into this package.

    It is a message, or its four parts.
    """
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(_message(parts), ContextMixWarning, stacklevel=depth)


def _message(parts: Sequence[str]) -> str:
    return four_parts(*parts) if len(parts) == 4 else " ".join(parts)


def four_parts(failed: str, seen: object, expected: str, remedy: str) -> str:
    """Returns the message of an error, its four parts always in the same order.

    Args:
        failed: What could not be done, as a clause without a full stop.
        seen: The value that caused it.
        expected: What would have been accepted.
        remedy: What the reader can do now.
    """
    return f"{failed}: got {seen}; expected {expected}. {remedy}"


def did_you_mean(name: object, known: Sequence[Any]) -> str:
    """Returns the question whether a near match was meant, or nothing where there is none."""
    texts = [one for one in known if isinstance(one, str)]
    near = get_close_matches(name, texts, 1) if isinstance(name, str) else []
    return f"Did you mean {near[0]!r}? " if near else ""


def reason(error: BaseException) -> str:
    """Returns the class of an error and the first line of what it says, for a message."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line if len(line) <= 200 else f'{line[:200]}...'}"


def seen(value: Any) -> str:
    """Returns a value for a message, whatever it is."""
    try:
        if getattr(value, "ndim", 0):
            return f"a {value.dtype} {type(value).__name__} of shape {tuple(value.shape)}"
        text = repr(value)
    except Exception:  # an object that cannot even be written out
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
