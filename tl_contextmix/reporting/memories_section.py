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
from tl_contextmix.reporting.drawing import quoted, stands_out
from tl_contextmix.reporting.story import Story

_MEMORIES = 3
_SHOWN = 2
_TRIGGERS = 5
_SENTENCES = 500


def memories(story: Story) -> Section | str:
    """Returns the memories that write most at the predicting position, and their triggers."""
    view, focus = story.forward_pass.view, story.focus
    if not story.complete:
        return story.missing
    if focus is None:
        return "the text has no mask token to predict"
    if story.stack is not None:
        return "the maps are the encoder's, but the answer is the decoder's"
    if view.readout.refusal:
        return view.readout.refusal
    found = ff_memories(story.model, story.text, pos=focus, k=_MEMORIES)
    rows = _fed(story, found.top(_MEMORIES, pos=focus))
    here = story.forward_pass.target.strings[0][focus]
    table = Table(
        title=f"Memories that fired at {quoted(here)}",
        caption=f"Per layer, the {_MEMORIES} memories that write the longest vectors: the token "
        "that the value promotes, the coefficient, the vector's norm, and the source with the "
        "largest share of the coefficient.",
        columns=("memory", "promotes", "coefficient", "norm", "top source"),
        rows=tuple((*row[:4], f"{row[4]} {row[5]:+.2f}") for row in rows),
        signed=("coefficient",),
    )
    rows.sort(key=lambda row: -row[3])
    longest = rows[0]
    # Triggers are contexts of the highest coefficients, so they explain positive ones.
    triggers, origin = _triggers(story, [row[0] for row in rows if row[2] > 0])
    finding = _finding(story, longest, [row[3] for row in rows])
    text = (
        "A feed-forward block outputs the sum of its neurons' value vectors, each times a "
        "coefficient. A promoted token is the top token of one value in isolation; the sum of "
        "hundreds may predict another, which the chart counts over the positions of this sentence. "
        "Triggers are the contexts in a corpus that activate a memory most: its strongest "
        f"responses, not everything it does. {origin}"
    )
    citation = sources("geva2021transformer", "geva2022transformer")
    cases = replace(found.figures().panels()[-1], title="Where each layer's top token comes from")
    panels = (table, cases, *triggers)
    title = "Which memories fired, and what triggers them?"
    return Section(title, text, panels, citation, finding)


def _finding(story: Story, longest: tuple, lengths: list[float]) -> str:
    """Returns which memory writes the longest vector, and whether that is the answer."""
    layer, neuron = longest[0][1:].split(".")
    logits = story.forward_pass.trace.logits
    description = f"neuron {neuron} of layer {layer}, which promotes {quoted(longest[1])}"
    if logits is not None and story.focus is not None:
        best = story.forward_pass.view.to_output(int(logits[0, story.focus].argmax()))
        description += "" if best == longest[1] else f" (the model predicts {quoted(best)})"
    source = f"Its top source is {quoted(longest[4])}."
    if stands_out(lengths) is None:
        return f"No single memory stands out; the longest vector is that of {description}. {source}"
    return f"The longest vector is that of {description}. {source}"


def _fed(story: Story, top: Any) -> list[tuple]:
    """Returns each memory, its promoted token, coefficient, norm, top source and its share."""
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
    """Returns triggers of the first of these memories that have any, and their origin.

    Uses the given triggers; for a demo model without any, mines its grammar, which takes a second.
    """
    if story.triggers is not None:
        return _samples(story.triggers, names), "These were mined beforehand."
    if story.forward_pass.view.name not in DEMO_NAMES or not story.forward_pass.view.reads_text():
        return [], (
            "None are shown here: mine a corpus with `tl-contextmix mine` and pass the folder as "
            "`--triggers`."
        )
    texts = _sentences()
    # Rendering triggers reads the folder, so it happens before the folder is deleted.
    with tempfile.TemporaryDirectory() as folder:
        mined = mine_triggers(
            story.model,
            texts,
            out=folder,
            k=_TRIGGERS,
            layer=sorted({int(name[1:].split(".")[0]) for name in names[:_SHOWN]}),
            unit="prefix" if "decoder" in story.forward_pass.view.stacks else "document",
            batch_size=64,
        )
        assert mined is not None
        return _samples(
            mined, names
        ), f"These are from {len(texts)} sentences of the model's grammar."


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
