"""What a command prints and writes of what it found: text, a table, a page, a picture, a file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tl_contextmix.commands.shared_options import Decorator, together
from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting import require_matplotlib, require_writable

_PICTURES = (".pdf", ".svg", ".png")
ENDINGS = (".html", ".json", ".csv", ".safetensors", *_PICTURES)


@dataclass(frozen=True)
class Wanted:
    """How the result of a command is wanted: in a file, as JSON, as a table, or not at all."""

    output: str | None
    as_json: bool
    csv: bool
    quiet: bool

    @property
    def in_words(self) -> bool:
        """Whether the result is said in words, and where it was written."""
        return not (self.quiet or self.as_json or self.csv)

    def emit(self, found: Any, *lines: object, facts: dict[str, Any] | None = None) -> None:
        """Prints what was found.

        Args:
            found: A result.
            *lines: Said instead of it, in words; none: as it says itself.
            facts: Its JSON; None: its table, with method, model and unit.
        """
        if self.as_json:
            text = as_text(found, ".json") if facts is None else json.dumps(facts, **_JSON)
            try:
                text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
            except UnicodeEncodeError:
                text = json.dumps(json.loads(text))
            click.echo(text)
        elif self.csv:
            click.echo(as_text(found, ".csv"))
        elif self.in_words:
            for line in lines or (found,):
                click.echo(str(line))

    def wrote(self, path: object) -> None:
        """Says where something was written."""
        if self.in_words:
            click.echo(path)

    def write(self, found: Any) -> None:
        """Writes a result as the name of the file says, if there is one, and says so."""
        if self.output is None:
            return
        path = Path(self.output)
        if path.suffix == ".html":
            found.show().save(path)
        elif path.suffix == ".safetensors":
            found.save(path)
        elif path.suffix in _PICTURES:
            found.figure().savefig(path)
        else:
            path.write_text(as_text(found, path.suffix) + "\n", encoding="utf-8")
        self.wrote(self.output)


_JSON: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False}


def add_output(*, csv: bool = True, written: str | None = "") -> Decorator:
    """Adds what is printed and written.

    Args:
        csv: Whether there is a table.
        written: Help of ``--output``; empty for a file of any form, None where another decorator
            adds it.
    """
    printed = "the table" if csv else "what is found"
    added = [click.option("--json", "as_json", is_flag=True, help=f"Print {printed} as JSON.")]
    if csv:
        added.append(click.option("--csv", is_flag=True, help="Print the table as CSV."))
    added.append(click.option("--quiet", is_flag=True, help="Print no result and no warnings."))
    if written is not None:
        help_text = written or f"Write the result: {', '.join(ENDINGS)}."
        added.append(click.option("-o", "--output", metavar="PATH", help=help_text))
    return together(*added)


def wanted(given: dict[str, Any], *, endings: tuple[str, ...] = ENDINGS) -> Wanted:
    """Takes out of the options of a command how its result is wanted, and checks that it can be.

    Args:
        given: The options of the command.
        endings: How the name of its file may end; none if its name may be any, or a folder's.
    """
    output, as_json, quiet = given.pop("output", None), given.pop("as_json"), given.pop("quiet")
    if output is not None and endings:
        require_written(output, endings, "--output")
    return Wanted(output, as_json, given.pop("csv", False), quiet)


def require_written(path: str, endings: tuple[str, ...], option: str) -> None:
    """Checks, before the work, that a file can be written in the form that its name asks for.

    Raises:
        ContextMixError: If it cannot be.
    """
    if (form := Path(path).suffix) not in endings:
        raise InvalidInput(
            "a result cannot be written in this form",
            repr(path),
            f"a name that ends in {', '.join(endings)}",
            f"Give another {option}.",
        )
    require_writable(path)
    if form in _PICTURES:
        require_matplotlib()


def as_text(found: Any, form: str) -> str:
    """Returns a result's table; positions are those of the input, and there is no padding."""
    frame = found.to_dataframe()
    if form == ".csv":
        return frame.to_csv(index=False).rstrip("\n")
    made = getattr(found, "provenance", None)
    fields = {
        "method": getattr(made, "method", None),
        "model": getattr(found if made is None else made, "model", None),
        "unit": getattr(found, "unit", None),
        "rows": json.loads(frame.to_json(orient="records", double_precision=15)),
    }
    return json.dumps(fields, **_JSON)
