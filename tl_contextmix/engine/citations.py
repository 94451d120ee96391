"""What to cite: BibTeX of the papers and programs behind each method."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ContextMap, Provenance, Result

_ENTRY = re.compile(r"^@\w+\{(\w+),\n(?:  \w+ = \{.+\},\n)+\}$", re.MULTILINE)
_FIELD = re.compile(r"^  (\w+) = \{(.+)\},$", re.MULTILINE)
_TOOLS = ("nanda2022transformerlens", "cooney2023circuitsvis")
# With the residual connection added, or in the map already; through an encoder, too.
ROLLOUT = ("abnar2020quantifying", "modarressi2022globenc", "ferrando2022towards")

_NORMS = ("kobayashi2020attention", "kobayashi2021incorporating", "kobayashi2024analyzing")
_NORMS_UNTIL = {"attn_out": 1, "resid_mid": 2}


def norm_papers(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the papers on norms that a map at a point takes: how far into the block decides."""
    return _NORMS[: _NORMS_UNTIL.get(options.get("at", ""), len(_NORMS))]


@functools.cache
def references() -> dict[str, str]:
    """Returns the entries of ``references.bib`` by key, with accents as they are read."""
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    return {found[1]: found[0] for found in _ENTRY.finditer(text)}


def cite(*used: Result | str | Callable[..., Any]) -> str:
    """Returns BibTeX of what was used, TransformerLens and CircuitsVis included.

    Args:
        used: Results, or methods: their names (``"value_zeroing"``) or the functions themselves.
            Of results, options count: a map at ``attn_out`` needs one paper of three, a rollout its
            own. Nothing: all there is.

    Returns:
        Entries in ASCII, each once, in the order they were used.

    Raises:
        InvalidInput: If something given is neither a result of this package nor one of its methods.

    Example:
        >>> import tl_contextmix as cm
        >>> print(cm.cite("value_zeroing").splitlines()[0])
        @inproceedings{mohebbi2023quantifying,
    """
    keys = [key for each in used for key in _keys(each)] if used else [*references()]
    return "\n\n".join(_ascii(references()[key]) for key in dict.fromkeys([*keys, *_TOOLS]))


def sources(*keys: str) -> str:
    """Returns works in one paragraph, for a reader."""
    return " ".join(_sentence(dict(_FIELD.findall(references()[key]))) for key in keys)


def _sentence(work: dict[str, str]) -> str:
    names = ", ".join(name.split()[-1] for name in work["author"].split(" and "))
    return f"{names}: {work['title'].strip('{}')} ({work['series']})."


def _keys(used: object) -> Iterator[str]:
    if isinstance(used, Result):
        origin = getattr(used, "provenance", None)
        yield from _of(origin) if isinstance(origin, Provenance) else ()
        yield from _rolled(used) if isinstance(used, ContextMap) else ()
        return
    name = used if isinstance(used, str) else getattr(used, "__name__", "")
    known = methods()
    if name == "rollout":
        yield from ROLLOUT
    elif name in known:
        yield from known[name].sources()
    else:
        raise InvalidInput(
            "there is nothing to cite",
            repr(used) if isinstance(used, str) else f"a {type(used).__name__}",
            f"a result, or one of {', '.join([*known, 'rollout'])}",
            "Give what a method returned, or its name.",
        )


def _of(origin: Provenance) -> Iterator[str]:
    """Yields the keys of a result's method and of its options."""
    # Results of mined triggers are named after their function: triggers.patterns.
    name = "mine_triggers" if origin.method.startswith("triggers.") else origin.method
    found = methods().get(name)
    yield from () if found is None else found.sources(origin.options)
    other = origin.options.get("minus")
    if other:  # a difference of two results
        yield from _of(replace(origin, method=other["method"], options=other["options"]))


def _rolled(map: ContextMap) -> Iterator[str]:
    """Yields the key of the way a map was rolled out, if it was."""
    options = map.provenance.options
    if not options.get("rollout"):
        return
    yield ROLLOUT[0] if options["add_identity"] else ROLLOUT[1]
    # A decoder's map over its own tokens and the encoder's was rolled out through both.
    if not map.source.equals(map.target):
        yield ROLLOUT[2]


def _ascii(text: str) -> str:
    """Returns the text with accents as TeX writes them."""
    marks = {"\u0301": "'", "\u0300": "`"}
    pieces = []
    for character in unicodedata.normalize("NFD", text.replace("ł", "{\\l}")):
        if character in marks:
            pieces[-1] = f"{{\\{marks[character]}{pieces[-1]}}}"
        else:
            pieces.append(character)
    return "".join(pieces)
