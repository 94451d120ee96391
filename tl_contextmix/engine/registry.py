"""Every method by name: what it rests on, and where else it is on offer."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])
Sources = Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]]

_ROOMS = ("tl_contextmix.methods", "tl_contextmix.evaluation")
_METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    """A public function and what is declared of it.

    Attributes:
        function: The function.
        cites: Keys in ``references.bib``, or a function that picks them by a result's options.
        compared: Rows of `tl_contextmix.compare`, each with the options that make it a map.
        of_prediction: Whether it explains one predicted token, so that ``pos`` and ``target`` say
            which.
        on_text: Whether it takes a model and a text, so that it is a command, too.
        estimated: Whether `tl_contextmix.estimate` can tell its cost, and knows it by name.
    """

    function: Callable[..., Any]
    cites: Sources
    compared: Mapping[str, Mapping[str, Any]]
    of_prediction: bool
    on_text: bool
    estimated: bool

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def asks(self) -> bool:
        """Whether it takes ``target``, ``foil`` and ``pos``."""
        options = get_args(get_type_hints(self.function).get("inputs"))
        return bool(options) and "target" in get_type_hints(options[0])

    def sources(self, options: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
        """Returns the keys of what a call with some options rests on."""
        return tuple(self.cites(options) if callable(self.cites) else self.cites)


def method(
    *,
    cites: Sources,
    compared: bool | Mapping[str, Mapping[str, Any]] = False,
    of_prediction: bool = False,
    on_text: bool = True,
    estimated: bool = True,
) -> Callable[[F], F]:
    """Registers a public function as a method; the function itself stays what it is.

    Args:
        cites: See `Method`.
        compared: True for one row of its own name, without options.
        of_prediction: See `Method`.
        on_text: See `Method`.
        estimated: See `Method`; False for what is not on text.
    """

    def register(function: F) -> F:
        rows = {function.__name__: {}} if compared is True else compared or {}
        known = Method(function, cites, rows, of_prediction, on_text, on_text and estimated)
        _METHODS[known.name] = known
        return function

    return register


def methods() -> dict[str, Method]:
    """Returns all methods by name, in alphabetical order."""
    for room in _ROOMS:
        for module in pkgutil.walk_packages(import_module(room).__path__, f"{room}."):
            import_module(module.name)
    return dict(sorted(_METHODS.items()))
