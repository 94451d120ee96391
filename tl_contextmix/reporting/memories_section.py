"""The report's section on memories: which fired, what they promote, what triggers them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.memories import Triggers, mine_triggers
from tl_contextmix.methods.memories.ff_memories import ff_memories
from tl_contextmix.methods.memories.token_memory import token_memory
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Panel, Samples, Table
from tl_contextmix.reporting.drawing import quoted
from tl_contextmix.reporting.story import Story

_MEMORIES = 3
_SHOWN = 2
_TRIGGERS = 5
_SENTENCES = 500


def memories(story: Story) -> Section | str:
    """Returns the memories that write most where the answer is read, and their triggers."""
    view, focus = story.done.view, story.focus
    if not story.complete:
        return story.missing
    if focus is None:
        return "there is no mask in the text to predict"
    if story.stack is not None:
        return "the maps are those of the encoder, and the answer is the decoder's"
    if view.readout.refusal:
        return view.readout.refusal
    found = ff_memories(story.model, story.text)
    rows = _fed(story, found.top(_MEMORIES, pos=focus))
    here = story.done.target.strings[0][focus]
    table = Table(
        title=f"Memories that fired at {quoted(here)}",
        caption=f"The {_MEMORIES} memories of each layer that add the longest vectors: the token "
        "the value promotes, its coefficient, the length it adds, and the token with the largest "
        "share in the coefficient, beside that share.",
        columns=("memory", "promotes", "coefficient", "length", "fed most by"),
        rows=tuple((*row[:4], f"{row[4]} {row[5]:+.2f}") for row in rows),
        signed=("coefficient",),
    )
    rows.sort(key=lambda row: -row[3])
    longest = rows[0]
    # Triggers are contexts of the highest coefficients, so they explain positive ones.
    triggers, origin = _triggers(story, [row[0] for row in rows if row[2] > 0])
    finding = (
        f"The longest vector is that of {longest[0]}: it promotes {quoted(longest[1])} and is fed "
        f"most by {quoted(longest[4])}."
    )
    text = (
        "A feed-forward block is the sum of its neurons' value vectors, each times a coefficient. "
        "A memory is read here by what its value would say alone; the sum of hundreds may say "
        "something else, which the chart counts over the positions of this sentence. A trigger is "
        "a context of a corpus that excites a memory most: what it answers to at its strongest, "
        f"not all it does. {origin}"
    )
    citation = sources("geva2021transformer", "geva2022transformer")
    cases = replace(found.figures().panels()[-1], title="How each layer's top token comes about")
    panels = (table, cases, *triggers)
    title = "Which memories fired, and what triggers them?"
    return Section(title, text, panels, citation, finding)


def _fed(story: Story, top: Any) -> list[tuple]:
    """Returns each memory, what it promotes, how much it adds, and the token that feeds it most."""
    chosen = sorted(set(top["neuron"]))
    fed = token_memory(story.model, story.text, pos=story.focus, neurons=chosen)
    words = fed.source.strings[0]
    rows = []
    for row in top.itertuples():
        shares = fed.shares[0, fed.layers.index(row.layer), 0, :, chosen.index(row.neuron)]
        source = int(shares.abs().argmax())
        name = f"L{row.layer}.{row.neuron}"
        share = float(shares[source])
        rows.append((name, row.promotes, row.coefficient, row.length, words[source], share))
    return rows


def _triggers(story: Story, names: list[str]) -> tuple[list[Panel], str]:
    """Returns the triggers of the first of these memories that have any, and where they are from.

    Those that were mined before; else a demo model's own grammar is mined here, in a second.
    """
    if story.triggers is not None:
        return _samples(story.triggers, names), "These were mined before."
    if story.done.view.name not in DEMO_NAMES:
        return [], (
            "None are shown: `tl-contextmix mine` finds them over a corpus of yours, and "
            "`--triggers` brings them here."
        )
    texts = _sentences()
    # Triggers read their contexts again, so they are drawn while the folder is there.
    with tempfile.TemporaryDirectory() as folder:
        mined = mine_triggers(
            story.model,
            texts,
            out=folder,
            k=_TRIGGERS,
            layer=sorted({int(name[1:].split(".")[0]) for name in names[:_SHOWN]}),
            unit="prefix" if "decoder" in story.done.view.stacks else "document",
            batch_size=64,
        )
        assert mined is not None
        return _samples(mined, names), f"These are from {len(texts)} sentences of its grammar."


def _samples(mined: Triggers, names: list[str]) -> list[Panel]:
    panels: list[Panel] = []
    for name in names:
        layer, neuron = map(int, name[1:].split("."))
        if layer not in mined.layers or len(panels) == _SHOWN:
            continue
        shown = mined.examples(layer, neuron, k=_TRIGGERS).panels()
        panels += [panel for panel in shown if isinstance(panel, Samples) and panel.labels]
    return panels


def _sentences() -> list[str]:
    from tl_contextmix.demo_models.grammar import Grammar

    grammar = Grammar(7, "train")
    return list(dict.fromkeys(grammar.sentence().text for _ in range(_SENTENCES)))
