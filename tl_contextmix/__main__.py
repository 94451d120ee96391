"""The command line: parse, call, exit."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from tl_contextmix.commands import as_options, commands
from tl_contextmix.errors import ContextMixWarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0: success. 1: `check` found an identity that does not hold, or the reader of the output closed
    it. 2: the command failed, or was not understood. 130: interrupted.

    Args:
        arguments: Command-line arguments; None for those of the process.
    """
    listed = sys.argv[1:] if arguments is None else [*arguments]
    # These libraries log about calls that the user did not write.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Tokens have characters that a redirected output on Windows has not (cp1252).
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "--quiet" in listed else "always", ContextMixWarning)
        warnings.showwarning = _EachOnce()
        try:
            code = commands.main(listed, prog_name="tl-contextmix", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.ClickException as error:
            click.echo(f"tl-contextmix: error: {_one_line(_misunderstood(error))}", err=True)
            return 2
    return code or 0


def _misunderstood(error: click.ClickException) -> str:
    """Returns what a command line is told that cannot be understood."""
    ctx = getattr(error, "ctx", None)
    advice = "" if ctx is None else f" See '{ctx.command_path} --help'."
    message = error.format_message()
    return f"{message}{'' if message[-1:] in '.?!' else '.'}{advice}"


class _EachOnce:
    """Prints each warning on one line, and no warning twice."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def __call__(
        self, message: Warning | str, category: type[Warning], *rest: object, **more: object
    ) -> None:
        ctx = click.get_current_context(silent=True)
        line = _one_line(as_options(str(message), ctx.command if ctx else None))
        if line not in self.shown:
            self.shown.add(line)
            click.echo(f"tl-contextmix: warning: {line}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
