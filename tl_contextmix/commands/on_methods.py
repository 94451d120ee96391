"""A command for each method: its options are those of the function."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import click

from tl_contextmix.adapters.loading import load_model
from tl_contextmix.commands.names import METHODS
from tl_contextmix.commands.output_options import add_output, wanted
from tl_contextmix.commands.shared_options import (
    add_asked,
    add_model,
    asked,
    flat,
    load_options,
    several,
)
from tl_contextmix.core.validation import checked
from tl_contextmix.engine.registry import methods
from tl_contextmix.engine.selection import Chosen

# Asked for in words of their own, or of no use in a command.
_NOT_OPTIONS = ("model", "input", "inputs", "tokenizer", "dictionary", "task")
# What is asked of other models, or cannot be asked with defaults alone.
_EXAMPLES = {
    "decoder-lens": 'encoder-decoder "the bat burned ."',
    "query-contributions": 'causal-lm "the keys to the cabinet" --neurons 2.78',
}


class Numbered(click.ParamType):
    """Numbers with dots between them, such as a layer and a neuron."""

    def __init__(self, name: str = "N.N") -> None:
        """Takes what stands for them in the help."""
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Returns the numbers."""
        try:
            return tuple(map(int, str(value).split(".")))
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


def command(name: str) -> click.Command:
    """Returns the command of a method."""
    method = methods()[name.replace("-", "_")]
    function, hints = method.function, typing.get_type_hints(method.function)

    def run(**given: Any) -> None:
        run_method(function.__name__, given)

    run = add_output()(run)
    for one in reversed([*inspect.signature(function).parameters.values()]):
        # What asks about a prediction has its position among what is asked.
        option = None if method.asks and one.name == "pos" else _option(one, hints[one.name])
        run = run if option is None else option(run)
    if method.asks:
        run = add_asked(generate=True)(run)
    run = click.argument("text", metavar="TEXT")(run)
    run = add_model()(run)
    summary = METHODS[name]
    help = (
        f"Prints {summary}.\n\nThe options are those of {function.__name__} in Python, where "
        "their values can be written here."
    )
    asks = _EXAMPLES.get(name, 'causal-lm "the keys to the cabinet"')
    example = f"\b\nExample:\n  tl-contextmix {name} {asks} --json"
    return click.command(name, help=help, epilog=example)(run)


def _option(parameter: inspect.Parameter, hint: Any) -> Any:
    """Returns the option of a parameter; None where its values are none of the command line."""
    if parameter.name in _NOT_OPTIONS:
        return None
    name = f"--{parameter.name.replace('_', '-')}"
    if parameter.name == "neurons" and hint in (Chosen, Chosen | None):
        help_text = "Layer and number, such as 2.78, or layer, head and number."
        return several(name, kind=Numbered(), help=help_text, required=hint == Chosen)
    if parameter.name == "target":  # of a method that is not asked about a prediction
        help_text = "A word to score; several, with an option each."
        return click.option(name, multiple=True, metavar="TOKEN", help=help_text)
    if parameter.name == "edge":
        return click.option(name, type=Numbered("L.H.T.S"), help="Layer, head, target, source.")
    if parameter.name == "pos":
        last = "the last" if parameter.default == -1 else "all"
        help_text = f"Positions, from the end if negative. Default: {last}."
        return several("--position", "pos", kind=click.INT, help=help_text)
    default = parameter.default
    shown: dict[str, Any] = {"required": True} if default is inspect.Parameter.empty else {}
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [one for arm in arms if get_origin(arm) is Literal for one in get_args(arm)]
    help_text = "" if default in (None, inspect.Parameter.empty) else f"Default: {default}."
    if choices and all(isinstance(one, str) for one in choices):
        return click.option(name, type=click.Choice(choices), help=help_text, **shown)
    if bool in arms:
        return click.option(f"{name}/--no-{name[2:]}", default=None, help=help_text)
    if int in arms:
        if any(get_origin(arm) not in (None, Literal) for arm in arms):
            return several(name, kind=click.INT, help=help_text, **shown)
        return click.option(name, type=int, metavar="N", help=help_text, **shown)
    if float in arms:
        return click.option(name, type=float, metavar="NUMBER", help=help_text, **shown)
    if str in arms:
        return click.option(name, metavar="NAME", help=help_text, **shown)
    return None


def run_method(name: str, given: dict[str, Any]) -> None:
    """Runs a method and prints, and writes, what it returns."""
    want = wanted(given)
    model, text, loading = given.pop("model"), given.pop("text"), load_options(given)
    method = methods()[name]
    question = asked(given) if method.asks else {}
    options = {
        key: flat(value) if isinstance(value, tuple) and key not in ("edge", "target") else value
        for key, value in given.items()
    }
    options = {key: value for key, value in options.items() if value not in (None, ())}
    found = checked(method.function)(load_model(model, **loading), text, **options, **question)
    want.emit(found)
    want.write(found)
