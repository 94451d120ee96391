"""Options that several commands take in the same words, and what they mean."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from tl_contextmix.commands.names import DEMOS

Decorator = Callable[[Any], Any]
DTYPES = ("float32", "float64", "bfloat16", "float16")


def together(*options: Decorator) -> Decorator:
    """Returns several options as one decorator; help has them in this order."""
    return lambda function: reduce(lambda made, one: one(made), reversed(options), function)


class Listed(click.ParamType):
    """Values of one kind with commas between them; the option may be repeated, too."""

    name = "list"

    def __init__(self, kind: click.ParamType) -> None:
        self.kind = kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Returns how help shows the values."""
        if isinstance(self.kind, click.Choice):
            return "NAME[,NAME...]"
        names = {click.INT: "N", click.STRING: "NAME"}
        return f"{names.get(self.kind, self.kind.name)}[,...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        """Returns the values of one use of the option."""
        parts = value if isinstance(value, list) else str(value).split(",")
        return [self.kind.convert(part, param, ctx) for part in parts]


def flat(given: tuple[list[Any], ...]) -> list[Any] | None:
    """Returns all values of an option that may be repeated; None if it was not used."""
    return [one for part in given for one in part] or None


def several(*names: str, kind: click.ParamType = click.STRING, **options: Any) -> Decorator:
    """Adds an option with values that have commas between them."""
    return click.option(*names, type=Listed(kind), multiple=True, **options)


def model_argument(*, required: bool) -> Decorator:
    """Adds MODEL, spelled and completed alike in every command."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        named = [CompletionItem(one) for one in DEMOS if one.startswith(incomplete)]
        return named or [CompletionItem(incomplete, type="dir")]

    shown = "MODEL" if required else "[MODEL]"
    return click.argument("model", metavar=shown, required=required, shell_complete=complete)


def add_model(*, required: bool = True) -> Decorator:
    """Adds the model, and where and how it is loaded."""
    return together(
        model_argument(required=required),
        click.option("--device", metavar="NAME", help="Such as cuda:1. Default: a GPU, if any."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32."),
    )


def load_options(given: dict[str, Any]) -> dict[str, Any]:
    """Takes out of the options of a command those of loading, and returns them."""
    device, dtype = given.pop("device"), given.pop("dtype")
    result: dict[str, Any] = {} if device is None else {"device": device}
    if dtype is not None:
        import torch

        result["dtype"] = getattr(torch, dtype)
    return result


def add_asked(*, generate: bool = False) -> Decorator:
    """Adds what is asked of a prediction."""
    added = [
        click.option(
            "--target",
            multiple=True,
            metavar="TOKEN",
            help="The predicted token, its leading space included; several, with an option each, "
            "are alternatives. Default: the model's best.",
        ),
        click.option(
            "--foil",
            multiple=True,
            metavar="TOKEN",
            help="The token that the target is contrasted with.",
        ),
        click.option(
            "--position",
            type=int,
            metavar="N",
            help="The predicting position, from the end if negative. Default: the last, or the "
            "mask.",
        ),
    ]
    if generate:
        told = "Explain what the model itself says next, at most N tokens."
        added.append(click.option("--generate", type=int, metavar="N", help=told))
    return together(*added)


def asked(given: dict[str, Any]) -> dict[str, Any]:
    """Takes out of the options of a command what is asked, and returns it as a method takes it."""
    result: dict[str, Any] = {}
    for name in ("target", "foil"):
        tokens = given.pop(name)
        if tokens:
            result[name] = tokens[0] if len(tokens) == 1 else set(tokens)
    for name, option in (("pos", "position"), ("generate", "generate")):
        number = given.pop(option, None)
        if number is not None:
            result[name] = number
    return result


def add_page(path: str) -> Decorator:
    """Adds the page that is written."""
    return together(
        click.option(
            "-o", "--output", metavar="PATH", default=path, show_default=True, help="The page."
        ),
        click.option("--open", "opened", is_flag=True, help="Open the page in a browser."),
    )


def open_if(opened: bool, path: str | Path) -> None:
    """Opens a page that was written, where that was asked for."""
    if opened:
        webbrowser.open(Path(path).resolve().as_uri())


class Resumable(click.Command):
    """A command that would go on where it was interrupted, and says so."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = "" if ctx.params["output"] is None else "; run the same command to resume"
            click.echo(f"tl-contextmix: interrupted{kept}", err=True)
            raise click.exceptions.Exit(130) from None
