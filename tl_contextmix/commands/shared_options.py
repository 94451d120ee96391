"""Options that several commands take in the same words."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from tl_contextmix.reporting import DEFAULT_MODEL

MODEL = "a demo model (causal-lm, masked-lm, encoder-decoder), a folder or a hub name"


def add_asked(command: argparse.ArgumentParser) -> None:
    """Adds what is asked of a prediction."""
    command.add_argument(
        "--target",
        metavar="TOKEN",
        nargs="+",
        help="the predicted token, its leading space included; several are alternatives; "
        "default: the model's best",
    )
    command.add_argument(
        "--foil", metavar="TOKEN", nargs="+", help="the token that the target is contrasted with"
    )
    command.add_argument(
        "--position",
        type=int,
        metavar="N",
        help="the predicting position, from the end if negative; default: the last, or the mask",
    )


def add_generate(command: argparse.ArgumentParser) -> None:
    """Adds what the model is to say itself."""
    command.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="explain what the model itself says next, at most N tokens",
    )


def asked(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns what is asked of a prediction, as options of a method."""
    sides = {"target": parsed.target, "foil": parsed.foil}
    found = {
        name: given[0] if len(given) == 1 else set(given)
        for name, given in sides.items()
        if given is not None
    }
    numbers = {"pos": parsed.position, "generate": getattr(parsed, "generate", None)}
    return found | {name: number for name, number in numbers.items() if number is not None}


def add_page(command: argparse.ArgumentParser, path: str, model: str | None) -> None:
    """Adds the model, and the page that is written."""
    command.add_argument(
        "--model", metavar="MODEL", default=model, help=f"{MODEL}; default: {DEFAULT_MODEL}"
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        default=path,
        help="path of the page; default: %(default)s",
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")


def written(path: Path, opened: bool) -> int:
    """Prints, and opens, a page that was written."""
    if opened:
        webbrowser.open(path.resolve().as_uri())
    print(path)
    return 0
