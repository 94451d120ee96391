"""README's table of what is tested.

Families and classes are the rows of the zoo; columns and methods are those of the goldens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import test_conformance as contract
import test_goldens as goldens
import zoo
import zoo_configs as rows
import zoo_others

_NAMES = {
    "gpt2": "GPT-2",
    "opt": "OPT",
    "neox": "GPT-NeoX, Pythia",
    "gptj": "GPT-J",
    "llama": "Llama",
    "llama_biased": "Llama with biases",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "gemma2": "Gemma 2",
    "olmo2": "OLMo 2",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "t5": "T5",
    "flan": "Flan-T5",
    "bart": "BART",
    "marian": "Marian",
    "mbart": "mBART",
    "m2m100": "M2M100",
    "pegasus": "Pegasus",
    "attn_only": "attention-only",
    "solu": "SoLU",
}


def answered(family: str) -> set[str]:
    """The methods that are asked about a family, by the names of their functions."""
    if family in zoo.OPAQUE_FEED_FORWARD:  # it has no goldens
        return {way.name for way in contract.METHODS if contract.answers(way, family)}
    return {name.partition(" ")[0] for name in goldens.asked(zoo.Case(family, ""))}


def _cell(methods: Iterable[str], found: set[str]) -> str:
    """Says whether all of a column's methods have an answer, none, or which."""
    column = dict.fromkeys(name.partition(" ")[0] for name in methods)
    some = [f"`{name}`" for name in column if name in found]
    return "yes" if len(some) == len(column) else ", ".join(some) or "-"


def table() -> str:
    """Returns the table in Markdown: a row per family, the majors of each class that loads it."""
    columns = goldens.METHODS
    lines = [
        f"| family | TransformerLens class (major versions) | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    hosts = {name: row.hosts for name, row in rows.FAMILIES.items()}
    hosts |= dict.fromkeys(rows.CONFIG_BUILT, rows.CONFIG_BUILT_HOSTS)
    for family, by_major in hosts.items():
        if family not in _NAMES:
            continue
        classes: dict[str, list[str]] = {}
        for major, names in sorted(by_major.items()):
            for name in names:
                classes.setdefault(name, []).append(str(major))
        held = ", ".join(f"{name} ({', '.join(found)})" for name, found in classes.items())
        cells = " | ".join(_cell(methods, answered(family)) for methods in columns.values())
        lines.append(f"| {_NAMES[family]} | {held} | {cells} |")
    return "\n".join([*lines, "", *others()])


def others() -> list[str]:
    """Returns the further families in a sentence, in lines of a page's width."""
    rows = zoo_others.OTHERS.values()
    both, newest, pairs = (
        ", ".join(row.name for row in rows if kept(row))
        for kept in (
            lambda row: row.majors == (3, 4),
            lambda row: row.majors == (4,) and not row.tokenizer,
            lambda row: row.tokenizer,
        )
    )
    text = (
        f"A test each on the TransformerBridge (3, 4; maps, FF maps, memories, log-prob): {both}; "
        f"on 4 alone {newest}, and with DecoderLens {pairs}."
    )
    return textwrap.wrap(text, 118, break_on_hyphens=False)
