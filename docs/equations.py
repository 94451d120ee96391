"""Equations and tables of docstrings, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]+)`")
_CROSS = re.compile(r":\w+:`([^`]+)`")
_DISPLAY = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n(?:\1 +\S.*| *(?=\n\1 +\S)))*)", re.MULTILINE)
_TABLE = re.compile(
    r"^( *)(=+ =[= ]*\n(?:.*\n)*?\1=+ =[= ]*\n(?:(?:.*\n)*?\1=+ =[= ]*\n)?)", re.MULTILINE
)


def marked(text: str) -> str:
    """Returns a docstring with its equations between dollars and its tables as they stand."""
    text = _TABLE.sub(lambda found: _fenced(found[1], found[2]), text)
    text = _DISPLAY.sub(lambda found: "\n" + _display(found[1], found[2]), text)
    text = _INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    return _CROSS.sub(r"`\1`", text)


def _display(indent: str, body: str) -> str:
    return f"{indent}$$\n{indent}{' '.join(body.split())}\n{indent}$$\n"


def _fenced(indent: str, body: str) -> str:
    lines = textwrap.dedent(body).strip("\n").splitlines()
    return "\n".join(f"{indent}{line}".rstrip() for line in ("```text", *lines, "```")) + "\n"


class Equations(griffe.Extension):
    """Rewrites every docstring that is read for the reference."""

    def __init__(self) -> None:
        """Knows no TypedDict yet."""
        self.typed_dicts: dict[str, dict[str, Any]] = {}

    def on_class(self, *, cls: griffe.Class, **others: Any) -> None:
        """Called with every class: a TypedDict gets the entries of the one it extends.

        What shows ``**inputs: Unpack[Inputs]`` option by option knows a class's own alone.
        """
        bases = [str(base) for base in cls.bases]
        if "TypedDict" in bases or any(base in self.typed_dicts for base in bases):
            for base in bases:
                for name, entry in self.typed_dicts.get(base, {}).items():
                    cls.members.setdefault(name, entry)
            self.typed_dicts[cls.name] = dict(cls.members)

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Called with every object that was found."""
        if obj.docstring is not None:
            obj.docstring.value = marked(obj.docstring.value)
