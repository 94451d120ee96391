"""What a public function is given, checked before it works and by its own annotations.

One place for all functions: names of options, kinds, ranges and choices. NumPy's numbers become
Python's on the way in. Whatever is raised afterwards comes out as it is.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy
import torch
from torch import Tensor
from typing_extensions import is_typeddict

from tl_contextmix.errors import InvalidInput, UnknownOption, did_you_mean, seen

MOST = 2**62
"""Upper bound for counts and document numbers."""
F = TypeVar("F", bound=Callable[..., Any])

RENAMED: dict[str, str] = {
    "Comparison": "tl_contextmix.results.Comparison",
    "ComponentReadouts": "tl_contextmix.results.ComponentReadouts",
    "CompositionFigures": "tl_contextmix.results.CompositionFigures",
    "ContextMap": "tl_contextmix.results.ContextMap",
    "Decomposition": "tl_contextmix.results.Decomposition",
    "Estimate": "tl_contextmix.results.Estimate",
    "FileFormatError": "tl_contextmix.errors.FileFormatError",
    "Knockout": "tl_contextmix.results.Knockout",
    "LayerCurves": "tl_contextmix.results.LayerCurves",
    "LayerFigures": "tl_contextmix.results.LayerFigures",
    "LayerwiseDecoding": "tl_contextmix.results.LayerwiseDecoding",
    "LayerwiseLikelihood": "tl_contextmix.results.LayerwiseLikelihood",
    "LayerwiseScores": "tl_contextmix.results.LayerwiseScores",
    "LogProbContributions": "tl_contextmix.results.LogProbContributions",
    "Memories": "tl_contextmix.results.Memories",
    "MinimalPair": "tl_contextmix.evaluation.MinimalPair",
    "PairChanges": "tl_contextmix.results.PairChanges",
    "QueryContributions": "tl_contextmix.results.QueryContributions",
    "Result": "tl_contextmix.results.Result",
    "Score": "tl_contextmix.results.Score",
    "TokenFigures": "tl_contextmix.results.TokenFigures",
    "TokenMemory": "tl_contextmix.results.TokenMemory",
    "TriggerAgreement": "tl_contextmix.results.TriggerAgreement",
    "TriggerExamples": "tl_contextmix.results.TriggerExamples",
    "TriggerPatterns": "tl_contextmix.results.TriggerPatterns",
    "Triggers": "tl_contextmix.methods.memories.Triggers",
    "ValueReadouts": "tl_contextmix.results.ValueReadouts",
    "agreement": "tl_contextmix.evaluation.agreement",
    "cue_alignment": "tl_contextmix.evaluation.cue_alignment",
    "decompx_vectors": "tl_contextmix.methods.decompx.decompx_vectors",
    "demo_pairs": "tl_contextmix.evaluation.demo_pairs",
    "flow_knockout": "tl_contextmix.methods.flow_knockout.flow_knockout",
    "hook_names": "tl_contextmix.evaluation.hook_names",
    "load_minimal_pairs": "tl_contextmix.evaluation.load_minimal_pairs",
    "merge_triggers": "tl_contextmix.methods.memories.merge_triggers",
    "mine_on_ray": "tl_contextmix.methods.memories.mine_on_ray",
    "rollout": "ContextMap.rollout",
    "composition.positions": "pos",
    "cue_alignment.targets": "pos",
    "decoder_lens.layers": "layer",
    "decoder_lens.tokens": "target",
    "faithfulness.answer": "target",
    "knockout.positions": "everywhere",
    "knockout.target_ids": "target",
    "log_prob_contributions.target_ids": "target",
    "log_prob_contributions.top_k": "k",
    "query_contributions.target_ids": "target",
    "query_contributions.top_k": "k",
    "value_zeroing.targets": "pos",
}
"""New names of what used to have another: a public name, or an option as ``"function.option"``."""

LATER = "checked by what reads it"
"""In an `Annotated` hint: left to the function, which knows more of it than its type."""


@dataclass(frozen=True)
class Rule:
    """What a value must fulfil besides its type, in an `Annotated` hint.

    Attributes:
        accepts: Whether a value does.
        words: What is expected, for messages.
    """

    accepts: Callable[[Any], bool]
    words: str


def _possible_path(value: Any) -> bool:
    return bool(str(value)) and "\0" not in str(value)


Positive = Annotated[int, Rule(lambda number: number >= 1, "an integer from 1")]
NotNegative = Annotated[int, Rule(lambda number: number >= 0, "an integer from 0")]
PositiveNumber = Annotated[float, Rule(lambda number: number > 0, "a number above 0")]
NotNegativeNumber = Annotated[float, Rule(lambda number: number >= 0, "a number from 0")]
FilePath = Annotated[str | Path, Rule(_possible_path, "a path")]
Layers = int | Sequence[int]

_MISFIT: Any = object()


def checked(function: F) -> F:
    """Returns a public function that checks what it is given, under its full signature.

    Options that are declared once for many functions (``**inputs: Unpack[Inputs]``) have each its
    name in the signature. Types of these are checked by what reads them.
    """
    signature = _full_signature(function)
    hints = typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in signature.parameters:
                raise _no_such_option(function.__name__, name, [*signature.parameters])
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises it in Python's own words
        for name, value in given.arguments.items():
            if name not in hints:
                continue
            accept = functools.partial(_accepted, function.__name__, name, hint=hints[name])
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            given.arguments[name] = tuple(map(accept, value)) if several else accept(value)
        return function(*given.args, **given.kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return typing.cast(F, call)


def _full_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature with the options of ``**inputs: Unpack[...]`` one by one."""
    hints = typing.get_type_hints(function, include_extras=True)
    signature, parameters = inspect.signature(function), []
    for name, parameter in signature.parameters.items():
        options = next(iter(get_args(hints.get(name))), None)
        if parameter.kind is not parameter.VAR_KEYWORD or not is_typeddict(options):
            parameters.append(parameter)
            continue
        for option, hint in options.__annotations__.items():
            hint = getattr(hint, "__forward_arg__", hint)
            parameters.append(
                inspect.Parameter(option, parameter.KEYWORD_ONLY, default=None, annotation=hint)
            )
    return signature.replace(parameters=parameters)


# Options that other methods have, and why not these.
_WITHOUT = {
    ("value_zeroing", "precision"): "Its distances are between vectors that are nearly equal: "
    "bfloat16 would leave them no digit. ",
}


def _no_such_option(function: str, name: str, known: Sequence[str]) -> UnknownOption:
    new = RENAMED.get(f"{function}.{name}")
    remedy = f"It is now called {new}. " if new else did_you_mean(name, known)
    remedy = _WITHOUT.get((function, name), remedy)
    return UnknownOption(
        f"{function} has no such option",
        name,
        f"some of {list(known)}",
        f"{remedy}See help(tl_contextmix.{function}).",
    )


def require_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises InvalidInput unless a value is one of the choices."""
    if not isinstance(value, str) or value not in known:
        raise InvalidInput(
            f"there is no such {name}",
            seen(value),
            f"one of {list(known)}",
            did_you_mean(value, known) + "Choose one of these.",
        )


def whole_number(value: Any) -> int | None:
    """Returns an integer, NumPy's and tensors without axes included; None for anything else."""
    # True would be position 1, and a mask of booleans a list of ones and zeros.
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_shape(name: str, shape: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    """Raises InvalidInput unless a tensor has as many entries per axis as there are labels."""
    if shape != expected:
        raise InvalidInput(
            f"{name} does not fit its labels",
            f"shape {shape}",
            f"shape {expected}",
            "Give every axis as many labels as it has entries.",
        )


def require_number(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number that is given; raises InvalidInput unless it is at least so large."""
    result = whole_number(value)
    if result is None or not least <= result < MOST:
        raise InvalidInput(
            f"{name} must be a whole number",
            f"{name}={value!r}"[:200],
            "a positive integer" if least == 1 else f"an integer from {least} on",
            "Leave it out for the default.",
        )
    return result


def _accepted(function: str, name: str, value: Any, hint: Any) -> Any:
    """Returns what is given as the function expects it.

    Raises:
        InvalidInput: If its annotation does not allow it.
    """
    result = _fit(value, hint)
    if result is not _MISFIT:
        return result
    listed = value if isinstance(value, (list, tuple)) else [value]
    choices = _choices(hint)
    texts = [one for one in listed if isinstance(one, str)]
    near = [did_you_mean(one, choices) for one in texts if one not in choices]
    raise InvalidInput(
        f"{function} cannot use this {name}",
        seen(value),
        _expected(hint) if all(map(is_text, texts)) else "characters that a text can have",
        f"{''.join(near[:1])}See help(tl_contextmix.{function}).",
    )


def _fit(value: Any, hint: Any) -> Any:
    """Returns a value as its annotation has it, or `_MISFIT` where it does not fit."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if kind is Annotated:
        found = value if LATER in inner[1:] else _fit(value, inner[0])
        rules = [rule for rule in inner[1:] if isinstance(rule, Rule)]
        fits = found is not _MISFIT and all(rule.accepts(found) for rule in rules)
        return found if fits else _MISFIT
    if kind in (Union, types.UnionType):
        found = (_fit(value, one) for one in inner)
        return next((one for one in found if one is not _MISFIT), _MISFIT)
    if kind is Literal:
        fits = any(type(value) is type(one) and value == one for one in inner)
        return value if fits else _MISFIT
    if kind is None:
        return _fit_one(value, hint)
    return _fit_many(value, kind, inner)


def _fit_one(value: Any, kind: Any) -> Any:
    if kind is int:
        number = whole_number(value)
        # Beyond 64 bits what counts up to a number never ends.
        return _MISFIT if number is None or not -(2**63) <= number < 2**63 else number
    if kind is bool:
        return bool(value) if isinstance(value, (bool, numpy.bool_)) else _MISFIT
    if kind is float:
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return value if fits else _MISFIT
    fits = isinstance(value, os.PathLike if kind is Path else kind)
    return value if fits and (kind is not str or is_text(value)) else _MISFIT


def is_text(value: str) -> bool:
    """Returns whether UTF-8 can hold a text: halves of surrogate pairs it cannot."""
    return value.isascii() or value.encode(errors="ignore").decode() == value


def as_list(given: Any) -> Any:
    """Returns an array or a column of a table (NumPy, pandas, datasets) as a list; else itself."""
    if isinstance(given, (str, bytes, Tensor, list, tuple, Mapping)):
        return given
    if hasattr(given, "tolist"):
        return given.tolist()
    return list(given) if isinstance(given, Sequence) else given


def _fit_many(value: Any, kind: Any, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, (numpy.ndarray, Tensor)) and value.ndim:
        value = value.tolist()
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, kind) or isinstance(value, (str, bytes)):
        return _MISFIT
    if kind is collections.abc.Callable or not inner:
        return value
    if isinstance(value, collections.abc.Mapping):
        pairs = [(_fit(k, inner[0]), _fit(v, inner[1])) for k, v in value.items()]
        return _MISFIT if any(k is _MISFIT or v is _MISFIT for k, v in pairs) else dict(pairs)
    hints = inner
    if kind is not tuple or ... in inner:
        hints = (inner[0],) * len(value)
    items = [_fit(one, hint) for one, hint in zip(value, hints, strict=False)]
    if len(value) != len(hints) or any(one is _MISFIT for one in items):
        return _MISFIT
    same = all(new is old for new, old in zip(items, value, strict=True))
    return value if same else tuple(items) if isinstance(value, tuple) else items


def _choices(hint: Any) -> list[Any]:
    """Returns everything that a hint names literally."""
    inner = get_args(hint)
    return [*inner] if get_origin(hint) is Literal else [x for one in inner for x in _choices(one)]


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
    Path: "a Path",
}


def _expected(hint: Any) -> str:
    """Returns what a hint allows, in words."""
    *words, last = _words(hint)
    return f"{', '.join(words)} or {last}" if words else last


def _words(hint: Any) -> list[str]:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        words = [word for one in inner for word in _words(one)]
        # "an integer, several or None"
        known = list(map(_several, words))
        return list(dict.fromkeys("several" if word in known else word for word in words))
    if kind is Annotated:
        rules = [rule.words for rule in inner[1:] if isinstance(rule, Rule)]
        return rules or _words(inner[0])
    if kind is Literal:
        return [f"one of {list(inner)}"]
    if kind is None:
        return [_NAMES.get(hint) or f"a {getattr(hint, '__name__', hint)}"]
    if kind is collections.abc.Callable:
        return ["a function"]
    if kind is tuple and Ellipsis not in inner:
        return [f"({', '.join(map(_expected, inner))})"]
    if not inner or issubclass(kind, collections.abc.Mapping):
        return [f"a {kind.__name__}"]
    return [_several(_expected(next(iter(inner))))]


def _several(word: str) -> str:
    article, _, noun = word.partition(" ")
    plain = article in ("a", "an") and noun.isalpha()
    return f"a list of {noun}s" if plain else f"several, each {word}"
