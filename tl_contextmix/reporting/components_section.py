"""The report's section on which components wrote the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.log_prob.contributions import log_prob_contributions
from tl_contextmix.methods.log_prob.knockout import knockout
from tl_contextmix.methods.log_prob.readouts import component_readouts
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Bars, Heatmap, Panel, Table
from tl_contextmix.reporting.drawing import quoted, stands_out
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import ComponentReadouts, LogProbContributions

_PARTS = 10
_HEADS = 3


def components(story: Story) -> Section | str:
    """Returns the sublayers, sources and neurons that wrote the answer, and a knockout."""
    view, focus = story.forward_pass.view, story.focus
    if focus is None:
        return "the text has no mask token to predict"
    if view.readout.refusal:
        return view.readout.refusal
    asked = vars(story.answer)
    layers, read = (
        log_prob_contributions(story.model, story.text, by=by, **asked)
        for by in ("layer", "position")
    )
    # If logits are not linear in the parts, finding the best neurons means evaluating all.
    linear = view.readout.head is None and view.readout.soft_cap is None
    feed_forwards = [block.feed_forward for block in view.blocks()]
    neurons = linear and all(ff is not None and ff.neurons_known for ff in feed_forwards)
    by, k = ("ff_neuron", _PARTS) if neurons else ("head", None)
    parts = log_prob_contributions(story.model, story.text, by=by, k=k, **asked)
    heads = log_prob_contributions(story.model, story.text, by="head", **asked).top(_HEADS)
    readouts = component_readouts(story.model, story.text, components=parts.top(_PARTS))
    fall = _without(story, parts.top(_PARTS) if neurons else None, heads)
    panels = (
        next(panel for panel in layers.panels() if isinstance(panel, Bars)),
        *(p for p in (*layers.panels(), *read.panels()) if isinstance(p, Heatmap)),
        _speaking(readouts, "feed-forward neurons" if neurons else "heads"),
        fall,
    )
    finding = " ".join((_best_layer(layers), _best_source(read), _fall(layers, fall)))
    text = (
        "A component's score is how much its vector raises the answer's log-probability when "
        "added to the residual stream before it. Scores of sublayers sum to the log-probability "
        "exactly; sources and neurons are each scored alone, given the stream before them. Scores "
        "capture direct effects only. The last table is a causal test: it ablates the best "
        "components and, as a control, as many random ones."
    )
    citation = sources("yu2023exploring", "yu2024neuron")
    return Section("Which components wrote the answer?", text, panels, citation, finding)


def _best_layer(layers: LogProbContributions) -> str:
    """Returns which sublayer adds most, if one stands out."""
    best, asked = layers.top(1), layers.asked(quote=quoted)
    description = f"{in_words(best.labels()[0])} ({float(best.scores[0, 0]):+.2f} nats)"
    if stands_out(layers.scores[0].tolist()) is None:
        return f"No single sublayer stands out for {asked}: {description} adds most."
    return f"{description[:1].upper()}{description[1:]} adds most to {asked}."


def _best_source(read: LogProbContributions) -> str:
    """Returns from which token in which layer most comes, if one stands out."""
    source = read.top(1)
    row = source.to_dataframe().iloc[0]
    word = quoted(row.source_token)
    frame = read.to_dataframe()
    if frame[frame.source_token.map(quoted) == word].source.nunique() > 1:
        word += f" ({row.source})"
    layer = int(source.components.layer[0, 0])
    description = f"{word} in layer {layer} ({float(source.scores[0, 0]):+.2f})"
    if stands_out(read.scores[0].nan_to_num().tolist()) is None:
        return f"No single source does: the largest is {description}."
    return f"The top source is {description}."


def _fall(layers: LogProbContributions, fall: Table) -> str:
    """Returns what the knockout did."""
    row: tuple[Any, ...] = fall.rows[-1]
    name, before, after, random, _ = row
    what = "its probability" if layers.foil is None else "its lead in probability"
    if abs(after - before) < 0.01:
        return f"Ablating {name} changes {what} by less than a percentage point."
    return (
        f"Ablating {name} takes {what} from {before:.0%} to {after:.0%} "
        f"(random ones: {random:.0%})."
    )


def in_words(label: str) -> str:
    """Returns the name of a sublayer, such as ``L2 mlp``, in words."""
    kinds = {"attn": "attention", "cross_attn": "cross-attention", "mlp": "the feed-forward block"}
    if label == "embed":
        return "the token's embedding"
    layer, _, kind = label.partition(" ")
    if kind not in kinds or not layer[1:].isdecimal():
        return label
    return f"{kinds[kind]} in layer {layer[1:]}"


def _speaking(readouts: ComponentReadouts, name: str) -> Panel:
    """Returns the best components and the tokens that their vectors promote."""
    panel = readouts.panels()[0]
    assert isinstance(panel, Table)
    kept = [panel.columns.index(column) for column in ("component", "score", "raises")]
    return replace(
        panel,
        title=f"Top {_PARTS} {name}",
        columns=tuple(panel.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in panel.rows),
    )


def _without(
    story: Story, neurons: LogProbContributions | None, heads: LogProbContributions
) -> Table:
    """Returns the answer's probability with the best components ablated."""
    found = {"heads": knockout(story.model, story.text, heads=heads)}
    if neurons is not None:
        found = {"neurons": knockout(story.model, story.text, neurons=neurons)} | found
    lead = "" if story.answer.foil is None else ", less that of its foil,"
    rows = []
    for name, out in found.items():
        frame = out.to_dataframe().set_index("quantity").loc["probability"]
        ablated = f"the {out.components.kind.shape[1]} best {name}"
        rows.append(
            (ablated, frame["before"], frame["after"], frame["control"], frame["best_after"])
        )
    return Table(
        title="Knockout of the best components",
        caption=f"Probability of the answer{lead} before and after ablation (activations set to "
        "zero at the predicting position), with as many random components ablated, and the model's "
        "top prediction after ablation.",
        columns=("ablated", "before", "after", "random", "predicts after"),
        rows=tuple(rows),
    )
