"""The commands of `tl-contextmix`: each calls one function.

They are click's (typer, a layer above it, takes options from annotations that are known before
anything runs; ours are those of the methods). A command is imported when it is called, so that help
and completion need not wait for torch.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from tl_contextmix.commands.names import COMMANDS, METHODS
from tl_contextmix.errors import ContextMixError

EPILOG = """\
\b
Examples:
  tl-contextmix report gpt2 "The keys to the cabinet" --target " are" --foil " is"
  tl-contextmix value-zeroing gpt2 "The keys to the cabinet" --layer 3 --json
  tl-contextmix attention-norms causal-lm "the keys" -o map.html

\b
Exit codes:
  0    done
  1    `check` found an identity that does not hold, or the reader of the output closed it
  2    the command failed, or was not understood
  130  interrupted

\b
Completion of commands, options and demo models; in the settings of the shell:
  eval "$(_TL_CONTEXTMIX_COMPLETE=bash_source tl-contextmix)"           bash
  eval "$(_TL_CONTEXTMIX_COMPLETE=zsh_source tl-contextmix)"            zsh
  _TL_CONTEXTMIX_COMPLETE=fish_source tl-contextmix | source            fish
"""


def as_options(text: str, command: click.Command | None) -> str:
    """Returns a message on arguments in Python as one on the options of a command."""
    for one in () if command is None else command.params:
        if not isinstance(one, click.Option):
            continue
        name, shown = {"position": "pos"}.get(one.name or "", one.name), one.opts[-1]
        text = re.sub(rf"\b{name}=True\b", shown, text)
        if one.secondary_opts:
            text = re.sub(rf"\b{name}=False\b", one.secondary_opts[-1], text)
        text = re.sub(rf"\b{name}=(?=[\s,.;:)]|$)", shown, text)
        text = re.sub(rf"\b{name}=(?=\S)", f"{shown} ", text)
    return text


class Commands(click.Group):
    """All commands; each is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands, methods last."""
        return [*COMMANDS, *METHODS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command; a method may be written as in Python."""
        name = cmd_name.replace("_", "-")
        if name in COMMANDS:
            module, _ = COMMANDS[name]
            return getattr(import_module(f"tl_contextmix.commands.{module}"), name)
        if name in METHODS:
            return import_module("tl_contextmix.commands.on_methods").command(name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that is called; for one that there is not, those like it."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name is None else name.replace("_", "-")), command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; says on one line where it is interrupted, or what cannot be done."""
        try:
            return super().invoke(ctx)
        except ContextMixError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            raise click.ClickException(as_options(str(error), command)) from error
        except KeyboardInterrupt:
            click.echo("tl-contextmix: interrupted", err=True)
            raise click.exceptions.Exit(130) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands, without importing them."""
        commands = {name: text for name, (_, text) in COMMANDS.items()}
        for heading, rows in (
            ("Commands", commands),
            ("Methods, each on a model and a text", METHODS),
        ):
            with formatter.section(heading):
                formatter.write_dl([*rows.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands that begin so, without importing them."""
        summaries = {name: text for name, (_, text) in COMMANDS.items()} | METHODS
        found = [
            CompletionItem(name, help=text)
            for name, text in summaries.items()
            if name.startswith(incomplete)
        ]
        return found or click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    "tl-contextmix",
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="tl-contextmix", message="tl-contextmix %(version)s")
def commands() -> None:
    """Which token, which memory, which component made the model say this?

    MODEL is a demo model (causal-lm, masked-lm, encoder-decoder), a folder or a hub name.
    """
