"""The command line: parse, call, exit."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from tl_contextmix.adapters.inputs import package_version
from tl_contextmix.commands import on_corpora, on_texts
from tl_contextmix.errors import ContextMixError, ContextMixWarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0: success. 1: `check` found an identity that does not hold. 2: the command failed.
    130: interrupted.

    Args:
        arguments: Command-line arguments; None for those of the process.
    """
    parsed = _parser().parse_args(arguments)
    # These libraries log about calls that the user did not write.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    with warnings.catch_warnings():
        warnings.simplefilter("always", ContextMixWarning)
        warnings.showwarning = _show_warning
        try:
            return parsed.command(parsed)
        except ContextMixError as error:
            print(f"tl-contextmix: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            resumes = "resumes" in parsed and parsed.output is not None
            kept = "; run the same command to resume" if resumes else ""
            print(f"tl-contextmix: interrupted{kept}", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-contextmix",
        description="Context mixing for TransformerLens models.",
    )
    parser.add_argument("--version", action="version", version=f"tl-contextmix {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (on_texts, on_corpora):
        group.add(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"tl-contextmix: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
