"""The report's section on an answer of several tokens: what each of them was made of."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.engine.citations import sources
from tl_contextmix.errors import UnsupportedModel
from tl_contextmix.methods.log_prob.contributions import log_prob_contributions
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Table
from tl_contextmix.reporting.components_section import in_words
from tl_contextmix.reporting.drawing import quoted, stands_out
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import ContextMap, LogProbContributions


def answer(story: Story) -> Section | str:
    """Returns, for every token that the model says, its probability, sublayers and sources."""
    if story.generate is None:
        return ""
    if story.forward_pass.view.readout.refusal:
        return story.forward_pass.view.readout.refusal
    count = story.generate
    try:
        layers, parts = (
            log_prob_contributions(story.model, story.text, by=by, generate=count)
            for by in ("layer", "position")
        )
    except UnsupportedModel as error:
        return str(error)
    read = parts.as_map()
    map = replace(read.panels()[0], title="Sources of every token of the answer")
    panels = (_table(layers, read), map)
    words = [row[0] for row in layers.target.strings]
    finding = f"The model says {quoted(''.join(words))}. {_word(read)}"
    text = (
        "The model reads what it has said itself and is asked about each token of it. A cell is "
        "how much one token's attention output adds to the log-probability of the answer's token, "
        "in nats, summed over heads and layers; blue speaks for it, red against it. Each output is "
        "scored alone, given the stream before it, and only directly: what a token did to other "
        "tokens before they were read is theirs."
    )
    citation = sources("yu2024neuron")
    return Section("What was each word of the answer made of?", text, panels, citation, finding)


def _table(layers: LogProbContributions, read: ContextMap) -> Table:
    """Returns a row for each token of the answer."""
    rows = []
    for row, (word,) in enumerate(layers.target.strings):
        scores = layers.scores[row].nan_to_num()
        best = int(scores.argmax())
        total = read.scores[0, :, 0, row].nan_to_num().sum(0)
        source = int(total.argmax())
        rows.append(
            (
                word,
                float(layers.log_prob[row].exp()),
                in_words(layers.labels()[best]),
                float(scores[best]),
                read.source.strings[0][source],
                float(total[source]),
            )
        )
    return Table(
        title="Every token of the answer",
        caption="Its probability, the sublayer that adds most, and the token whose attention "
        "outputs add most over all layers, in nats.",
        columns=("token", "probability", "top sublayer", "adds", "top source", "adds in all"),
        rows=tuple(rows),
        signed=("adds", "adds in all"),
    )


def _word(read: ContextMap) -> str:
    """Returns the token of the answer with the clearest source, if there is one."""
    totals = read.scores[0, :, 0].nan_to_num().sum(0)
    found = []
    for row, scores in enumerate(totals):
        place = stands_out(scores.tolist())
        if place is not None:
            found.append((float(scores[place]), row, place))
    if not found:
        return "No source stands out for any of its tokens."
    score, row, place = max(found)
    return (
        f"The clearest source is that of {quoted(read.target.strings[0][row])}: "
        f"{quoted(read.source.strings[0][place])} ({score:+.2f} nats)."
    )
