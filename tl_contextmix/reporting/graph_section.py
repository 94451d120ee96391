"""The report's section on how the answer came about: the attribution graph."""

from __future__ import annotations

from tl_contextmix.engine.citations import sources
from tl_contextmix.errors import UnsupportedModel
from tl_contextmix.methods.flow import flow
from tl_contextmix.plotting import Section
from tl_contextmix.reporting.drawing import quoted
from tl_contextmix.reporting.story import Story

_NODES = 60


def graph(story: Story) -> Section | str:
    """Returns the attribution graph of the answer."""
    view = story.forward_pass.view
    if story.focus is None:
        return "the text has no mask token to predict"
    if view.readout.refusal:
        return view.readout.refusal
    mined = story.triggers
    try:
        # Triggers are those of neurons.
        options = {"neurons": mined is not None, "k": _NODES, **vars(story.answer)}
        found = flow(story.model, story.text, **options)
    except UnsupportedModel as error:
        return str(error)
    found = found if mined is None else found.with_triggers(mined)
    frame = found.to_dataframe()
    single = frame[(frame.pos >= 0) & (frame.kind != "answer")]
    heads, tokens = single[single["head"] >= 0], single[single.kind.str.endswith("embed")]
    findings = []
    for what, rows in (("token", tokens), ("head", heads)):
        if len(rows):
            row = rows.loc[rows.score.abs().idxmax()]
            name = quoted(row.token) if what == "token" else f"{row.label} at {quoted(row.token)}"
            findings.append(f"the {what} with the largest effect is {name} ({row.score:+.2f} nats)")
    share = found.explained / found.score if found.score else 1.0
    finding = f"{'; '.join(findings)}. {len(single)} of {found.possible:,} nodes carry {share:.0%}"
    text = (
        "With attention patterns, norms and activation slopes frozen at their real values, the "
        "answer's score is a sum over paths from tokens through heads and feed-forward blocks. "
        "A node's effect is everything that runs through it; edges into it and out of it add up "
        "to that. What is not shown is one node for each layer. Patterns are not explained: what "
        "decides where a head looks is no edge. Point at a node for its edges; click to keep it."
    )
    finding = f"{finding[:1].upper()}{finding[1:]} of its score."
    citation = sources("ameisen2025circuit")
    return Section("How did the answer come about?", text, found.panels(), citation, finding)
