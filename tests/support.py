"""README's table of what is tested: families, classes and methods, from the rows of the tests."""

from __future__ import annotations

import zoo
import zoo_configs as rows

_NAMES = {
    "gpt2": "GPT-2",
    "opt": "OPT",
    "neox": "GPT-NeoX, Pythia",
    "gptj": "GPT-J",
    "llama": "Llama",
    "llama_biased": "Llama with biases",
    "mistral": "Mistral",
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


def table() -> str:
    """Returns the table in Markdown: a row per family, the majors of each class that loads it."""
    lines = [
        "| family | TransformerLens class (major versions) | maps | FF maps | memories | log-prob "
        "| DecoderLens |",
        "|---|---|---|---|---|---|---|",
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
        opaque = family in zoo.OPAQUE_FEED_FORWARD
        neurons = not opaque and family != "attn_only"
        marks = [neurons, neurons, True, zoo.Case(family, "").encoder_decoder]
        maps = "of attention" if opaque else "yes"
        cells = " | ".join([maps, *("yes" if mark else "-" for mark in marks)])
        lines.append(f"| {_NAMES[family]} | {held} | {cells} |")
    return "\n".join(lines)
