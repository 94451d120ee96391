"""Rows of a data set as prompts with a target and a foil, in the formats they are published in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.evaluation.minimal_pairs import MinimalPair

NAMES = ("prompt", "target", "foil", "category")
_CATEGORIES = ("category", "UID", "relation_id")
_NAME = re.compile(r"\b[A-Z][^\W\d_]*")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked in one row.

    Attributes:
        text: What it reads: a text, a chat, or a pair of sentences that ask for the word in which
            they differ.
        target: The token it is asked about, alternatives in a set, or an answer of several tokens;
            None: the model's best.
        foil: What the target is contrasted with, or None.
        category: The row's category; empty for none.
    """

    text: Any
    target: Any = None
    foil: Any = None
    category: str = ""


def read_row(row: str, columns: Mapping[str, str], *, causal: bool) -> Prompt:
    """Returns the prompt of a row.

    Args:
        row: The row as JSON: an object, or a list of prompt, target, foil and category.
        columns: The row's own names for some of `NAMES`.
        causal: Whether the model continues a text, rather than filling in a mask.
    """
    found = json.loads(row)
    if isinstance(found, list):
        if not 1 <= len(found) <= len(NAMES):
            raise _no_prompt(found)
        found = dict(zip(NAMES, found, strict=False))
    if not isinstance(found, dict):
        raise _no_prompt(found)
    # NaN is what pandas has in an empty cell, "" what a CSV file has.
    found = {name: None if one != one or one == "" else one for name, one in found.items()}
    for name, own in columns.items():
        if own not in found:
            raise _no_prompt(found, f"a column {own!r}, the {name}")
        found[name] = found[own]
    category = next((found[name] for name in _CATEGORIES if found.get(name) is not None), "")
    if "prompt" not in columns:
        for names, read in _FORMATS.items():
            fits = causal or read is not _one_prefix
            if fits and all(found.get(name) is not None for name in names):
                try:
                    prompt = read(found)
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    if isinstance(error, InvalidInput):
                        raise
                    raise _no_prompt(
                        found, f"what this format has in {', '.join(names)}"
                    ) from error
                return replace(prompt, category=prompt.category or str(category))
    if found.get("prompt") is None:
        raise _no_prompt(found)
    target, foil = (_one_or_several(found, name) for name in ("target", "foil"))
    return Prompt(found["prompt"], target, foil, str(category))


def _one_or_several(row: Row, name: str) -> Any:
    """Returns a list, which is how JSON writes several, as a set of alternatives."""
    one = row.get(name)
    if not isinstance(one, list):
        return one
    if any(isinstance(each, (list, dict)) for each in one):
        raise _no_prompt(row, f"a {name} that is a text or an id, or a list of these")
    return frozenset(one)


def _no_prompt(row: object, expected: str = "") -> InvalidInput:
    return InvalidInput(
        "this row is no prompt",
        list(row)[:20] if isinstance(row, dict) else seen(row),
        expected or "columns prompt, target, foil and category, or a known format",
        "Name its columns with columns={'prompt': ..., 'target': ...}.",
    )


def _word(text: object) -> str:
    """Returns a word as it follows a text."""
    return " " + str(text).strip()


def _one_prefix(row: Row) -> Prompt:
    """A pair that is decided by the first word after a prefix, whatever follows it."""
    good, wrong = (_word(row[f"one_prefix_word_{name}"]) for name in ("good", "bad"))
    return Prompt(row["one_prefix_prefix"].rstrip(), good, wrong)


def _counterfact(row: Row) -> Prompt:
    """A record of counterfact.json (Meng et al. 2022)."""
    asked = row["requested_rewrite"]
    text = asked["prompt"].format(asked["subject"])
    true, new = (asked[name]["str"] for name in ("target_true", "target_new"))
    return Prompt(text, _word(true), _word(new), str(asked.get("relation_id") or ""))


def _known(row: Row) -> Prompt:
    """A record of known_1000.json (Meng et al. 2022)."""
    return Prompt(str(row["prompt"]).rstrip(), _word(row["attribute"]))


def _tracing(row: Row) -> Prompt:
    """CounterFact, one row for each fact."""
    true, false = (_word(row[name]) for name in ("target_true", "target_false"))
    return Prompt(str(row["prompt"]).rstrip(), true, false)


def _names(row: Row) -> Prompt:
    """Indirect objects with both names given (Wang et al. 2023): all before the last one."""
    before, _, _ = str(row["text"]).rpartition(str(row["IO"]))
    if not before.strip():
        raise _no_prompt(row, "a text that ends with its indirect object IO")
    return Prompt(before.rstrip(), _word(row["IO"]), _word(row["S"]))


def _sentence(row: Row) -> Prompt:
    """Indirect objects as whole sentences: the last word, rather than the name that is repeated."""
    before, _, last = str(row["ioi_sentences"]).strip().rpartition(" ")
    names = _NAME.findall(before)
    twice = {name for name in names if names.count(name) == 2}
    if len(twice) != 1 or last.strip(".") not in names:
        raise _no_prompt(row, "a sentence with one name twice and another at its end")
    return Prompt(before, _word(last.strip(".")), _word(*twice))


def _choices(row: Row) -> Prompt:
    """A prompt with choices, the right one by its number."""
    choices, right = row["choices"], row["answerKey"]
    if not isinstance(choices, list) or right not in range(len(choices)):
        raise _no_prompt(row, "choices and the number of the right one")
    others = frozenset(_word(one) for place, one in enumerate(choices) if place != right)
    return Prompt(str(row["prompt"]).rstrip(), _word(choices[right]), others or None)


def _pair(row: Row) -> Prompt:
    spans = (tuple(map(tuple, row.get(name) or ())) for name in ("cues", "lures"))
    return Prompt(MinimalPair(row["good"], row["bad"], *spans))


_FORMATS: dict[tuple[str, ...], Callable[[Row], Prompt]] = {
    ("one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad"): _one_prefix,
    ("sentence_good", "sentence_bad"): lambda row: Prompt(
        MinimalPair(row["sentence_good"], row["sentence_bad"])
    ),
    ("good", "bad"): _pair,
    ("requested_rewrite",): _counterfact,
    ("prompt", "target_true", "target_false"): _tracing,
    ("prompt", "subject", "attribute"): _known,
    ("prompt", "choices", "answerKey"): _choices,
    ("messages",): lambda row: Prompt(row["messages"]),
    ("text", "IO", "S"): _names,
    ("ioi_sentences",): _sentence,
}
"""How rows with some fields are read: BLiMP's, facts, indirect objects, chats."""
