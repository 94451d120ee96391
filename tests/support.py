"""Tables of what is tested: README's, and the long one of the documentation.

Families and classes are the rows of the zoo; columns and methods are those of the goldens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    """Returns the long table in Markdown: a row per family, the majors of each class."""
    columns = goldens.METHODS
    lines = [
        f"| family | TransformerLens class (major versions) | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for family, by_major in _hosts().items():
        classes: dict[str, list[str]] = {}
        for major, names in sorted(by_major.items()):
            for name in names:
                classes.setdefault(name, []).append(str(major))
        held = ", ".join(f"{name} ({', '.join(found)})" for name, found in classes.items())
        lines.append(f"| {_NAMES[family]} | {held} | {' | '.join(_cells(family))} |")
    for name, majors, cells in _once():
        held = ", ".join(map(str, majors))
        lines.append(f"| {name} | TransformerBridge ({held}) | {' | '.join(cells)} |")
    for name in _direct():
        lines.append(f"| {name} | the Hugging Face model itself | {' | '.join(_DIRECT_CELLS)} |")
    for name, cells in _SPEECH_CELLS.items():
        lines.append(f"| {name} | the Hugging Face model itself | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary() -> str:
    """Returns README's table in Markdown: families by what is answered."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in _hosts():
        groups.setdefault(_cells(family), []).append(_NAMES[family])
    for name, _, cells in _once():
        groups.setdefault(cells, []).append(name)
    groups[_DIRECT_CELLS] = [*_direct()]
    for name, cells in _SPEECH_CELLS.items():
        groups.setdefault(cells, []).append(name)
    columns = goldens.METHODS
    lines = [f"| {' | '.join(columns)} | families |", "|---|" + "---|" * len(columns)]
    for cells, names in groups.items():
        lines.append(f"| {' | '.join(cells)} | {', '.join(names)} |")
    return "\n".join(lines)


def _hosts() -> dict[str, dict[int, tuple[str, ...]]]:
    """Returns the classes by major version of every family of the zoo with a name."""
    hosts = {name: row.hosts for name, row in rows.FAMILIES.items()}
    hosts |= dict.fromkeys(rows.CONFIG_BUILT, rows.CONFIG_BUILT_HOSTS)
    return {name: by_major for name, by_major in hosts.items() if name in _NAMES}


def _cells(family: str) -> tuple[str, ...]:
    return tuple(_cell(methods, answered(family)) for methods in goldens.METHODS.values())


def _once() -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Yields the families with a test of their own: name, versions, cells."""
    every = ("yes",) * (len(goldens.METHODS) - 1)
    for other in zoo_others.OTHERS.values():
        yield other.name, other.majors, (*every, "yes" if other.tokenizer else "-")
    for one in (*zoo_others.ENCODERS.values(), *zoo_others.WRAPPERS.values()):
        yield one.name, one.majors, (*every, "-")
    for other in zoo_others.ENDINGS.values():
        yield other.name, other.majors, (*every, "-")


_DIRECT_CELLS = ("-", "-", "-", "-", "yes")


def _direct() -> Iterator[str]:
    """Yields the families of which the Hugging Face model itself is asked."""
    read = {other.name for other in zoo_others.OTHERS.values()}
    for other in zoo_others.DIRECT.values():
        if other.name not in read:
            yield other.name


# See `test_speech.py`.
_SPEECH_CELLS = {
    "Whisper": ("all but gradients", "yes", "yes", "yes", "yes"),
    # With a CTC head; without one there is nothing that is predicted.
    "wav2vec2": ("all but gradients", "yes", "yes", "yes", "-"),
    "HuBERT": ("all but gradients", "yes", "yes", "yes", "-"),
}
