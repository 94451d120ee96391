"""What can be called, known without importing it: help and completion must not wait for torch."""

from __future__ import annotations

import re
from pathlib import Path

COMMANDS = {
    "report": ("on_texts", "write a page on what a model's blocks do to a sentence"),
    "explore": ("on_texts", "ask a model about texts of your own, on a page of this machine"),
    "explain": ("on_texts", "say in words why a model predicts a token"),
    "compare": ("on_texts", "compare all methods on minimal pairs"),
    "check": ("on_texts", "verify that a model is read correctly"),
    "scan": ("on_corpora", "find the layers, heads and neurons that answer many prompts"),
    "mine": ("on_corpora", "find the contexts in a corpus that activate each memory most"),
    "merge": ("on_corpora", "merge the results of several processes"),
    "show": ("on_corpora", "show mined triggers"),
}
"""Name, module and first line of the help of each command that is no method."""

DEMOS = ("causal-lm", "masked-lm", "encoder-decoder")
"""What MODEL may be, beside folders and names of published weights."""

_ROOT = Path(__file__).parents[1]
_METHOD = re.compile(
    r"^@method\((?P<declared>(?:.|\n)*?)^def (?P<name>\w+)\((?P<takes>(?:.|\n)*?)"
    r'"""(?P<summary>.*)$',
    re.MULTILINE,
)


def _methods() -> dict[str, str]:
    """Returns name and first line of the help of each method that takes a model and a text."""
    found = {}
    for room in ("methods", "evaluation"):
        for path in (_ROOT / room).rglob("*.py"):
            for one in _METHOD.finditer(path.read_text(encoding="utf-8")):
                on_text = "on_text=False" not in one["declared"]
                if on_text and re.search(r"\binput:", one["takes"]):
                    summary = one["summary"].removeprefix("Returns ").rstrip(".")
                    found[one["name"].replace("_", "-")] = summary
    return dict(sorted(found.items()))


METHODS = _methods()
