"""The report's section on which components wrote the answer."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.log_prob.contributions import log_prob_contributions
from tl_contextmix.methods.log_prob.knockout import knockout
from tl_contextmix.methods.log_prob.readouts import component_readouts
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Bars, Heatmap, Panel, Table
from tl_contextmix.reporting.drawing import quoted
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import ComponentReadouts, LogProbContributions

_PARTS = 10
_HEADS = 3


def components(story: Story) -> Section | str:
    """Returns which sublayers, sources and neurons wrote the answer, and a test of the best."""
    view, focus = story.done.view, story.focus
    if focus is None:
        return "there is no mask in the text to predict"
    if view.readout.refusal:
        return view.readout.refusal
    layers, read = (
        log_prob_contributions(story.model, story.text, by=by, pos=focus)
        for by in ("layer", "position")
    )
    # Where logits are no sums, finding the best neurons takes evaluating all of them.
    linear = view.readout.head is None and view.readout.soft_cap is None
    neurons = linear and view.blocks()[0].feed_forward is not None
    by, k = ("ff_neuron", _PARTS) if neurons else ("head", None)
    parts = log_prob_contributions(story.model, story.text, by=by, pos=focus, k=k)
    heads = log_prob_contributions(story.model, story.text, by="head", pos=focus).top(_HEADS)
    readouts = component_readouts(story.model, story.text, components=parts.top(_PARTS))
    fall = _without(story, parts.top(_PARTS) if neurons else None, heads)
    panels = (
        next(panel for panel in layers.panels() if isinstance(panel, Bars)),
        *(p for p in (*layers.panels(), *read.panels()) if isinstance(p, Heatmap)),
        _speaking(readouts, "feed-forward neurons" if neurons else "heads"),
        fall,
    )
    best, source = layers.top(1), read.top(1)
    word = source.to_dataframe().source_token[0]
    finding = (
        f"{quoted(layers.target.strings[0][0])} comes most from {best.labels()[0]} "
        f"({float(best.scores[0, 0]):+.2f} nats); of all tokens read, most from {quoted(word)} in "
        f"layer {int(source.components.layer[0, 0])} ({float(source.scores[0, 0]):+.2f}). Without "
        f"{fall.rows[-1][0]} its probability goes from {fall.rows[-1][1]:.0%} to "
        f"{fall.rows[-1][2]:.0%} (random ones: {fall.rows[-1][3]:.0%})."
    )
    text = (
        "How much each part of the vector that the answer is read from raises the answer's "
        "log-probability, added to what was there before it. Scores of sublayers add up to the "
        "log-probability exactly; those of sources and neurons are each taken alone, and depend on "
        "what came before. A component may also act through later ones, which a score does not "
        "see: the last table takes the best out and asks the model again, beside as many random "
        "ones."
    )
    citation = sources("yu2023exploring", "yu2024neuron")
    return Section("Which components wrote the answer?", text, panels, citation, finding)


def _speaking(readouts: ComponentReadouts, name: str) -> Panel:
    """Returns the best components and the tokens their vectors raise."""
    panel = readouts.panels()[0]
    assert isinstance(panel, Table)
    kept = [panel.columns.index(column) for column in ("component", "score", "raises")]
    return replace(
        panel,
        title=f"The {_PARTS} {name} that raise it most",
        columns=tuple(panel.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in panel.rows),
    )


def _without(
    story: Story, neurons: LogProbContributions | None, heads: LogProbContributions
) -> Table:
    """Returns what is left of the answer when the best components are taken out."""
    found = {"heads": knockout(story.model, story.text, heads=heads)}
    if neurons is not None:
        found = {"neurons": knockout(story.model, story.text, neurons=neurons)} | found
    rows = []
    for name, out in found.items():
        frame = out.to_dataframe().set_index("quantity").loc["probability"]
        taken = f"the {out.components.kind.shape[1]} best {name}"
        rows.append((taken, frame["before"], frame["after"], frame["control"], frame["best_after"]))
    return Table(
        title="Does the answer fall without them?",
        caption="Probability of the answer as it is, without them (their activations set to zero "
        "where the answer is read), and without as many random ones; what the model then says.",
        columns=("taken out", "before", "after", "random", "then says"),
        rows=tuple(rows),
    )
