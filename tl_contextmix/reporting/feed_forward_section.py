"""The report's section on what the feed-forward block changed."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.norm_changes import (
    amplified_pairs,
    cancellation,
    contextualization_change,
)
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Heatmap, Table
from tl_contextmix.reporting.drawing import largest, quoted, shares
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import PairChanges

_PAIRS = 2


def feed_forward(story: Story) -> Section | str:
    """Returns what the feed-forward block changed, and what was undone after it."""
    if not story.complete:
        return story.missing
    change, undone = contextualization_change(story.maps), cancellation(story.maps)
    # The third quantity, a ratio of norms, is on another scale.
    undone = replace(
        undone.select(quantity=["cancel", "recover"]),
        caption="cancel (a cosine): below 0, RES and LN move the map against FF's change. "
        "recover (a difference of rank correlations): above 0, the block's map is closer to the "
        "one before FF.",
    )
    pairs = amplified_pairs(story.maps["mlp_in"], story.maps["mlp_out"], k=_PAIRS)
    panels = (*change.panels(), *undone.panels(), _difference(story), _table(pairs))
    layer, quantity = largest(change.values[0])
    name = change.quantities[quantity]
    where = _NAMES.get(name.rstrip("0123456789"), name)
    finding = (
        f"The ranking of token pairs changes most through {where} ({name}) in layer "
        f"{change.layers[layer]} ({float(change.values[0, layer, quantity]):.3f})."
    )
    if pairs.amplified:
        top = max(pairs.amplified, key=lambda pair: pair.change)
        sentence = (
            f" Most amplified: {quoted(top.source_token)} for {quoted(top.target_token)} in layer "
            f"{top.layer}, from {top.before:.0%} to {top.after:.0%} of the row."
        )
        # In whole percents, as they are told.
        small = round(top.after, 2) <= round(top.before, 2)
        finding += " No pair's share grows by a percentage point." if small else sentence
    text = (
        "FF is the feed-forward block, RES the residual connection, LN the layer norm. The first "
        "chart compares the ranking of token pairs before and after each component; it is blind "
        "to changes that preserve the ranking. The second shows whether RES and LN undo FF's "
        "change: if so, an amplified pair is masked again in the block's output. The map after FF "
        "carries parts through each neuron's activation by integrated gradients from zero: exact "
        "in sum, but the split is a convention."
    )
    title = "What did the feed-forward block change?"
    return Section(title, text, panels, sources("kobayashi2024analyzing"), finding)


_NAMES = {
    "ATB": "attention",
    "FF": "the feed-forward block",
    "RES": "the residual connection",
    "LN": "the layer norm",
}


def _difference(story: Story) -> Heatmap:
    """Returns the map after the feed-forward block minus the map before it."""
    after = shares(story.maps["mlp_out"], "Share after the feed-forward block minus before", "")
    before = story.maps["mlp_in"].normalize()
    return replace(
        after,
        caption="Blue: amplified; red: suppressed. Rows of both maps sum to 1.",
        values=after.values - before.scores.detach().cpu().flatten(1, 2)[0],
    )


def _table(pairs: PairChanges) -> Table:
    """Returns the most amplified and most suppressed pairs of each layer."""
    rows = []
    for one in sorted((*pairs.amplified, *pairs.suppressed), key=lambda p: (p.layer, -p.change)):
        name = f"{one.source_token} ({one.source}) → {one.target_token} ({one.target})"
        rows.append((one.layer, name, one.before, one.after, one.change))
    return Table(
        title="Pairs changed most by the feed-forward block",
        caption=f"Per layer, the {_PAIRS} most amplified and most suppressed pairs by share of the "
        "target's row, source → target.",
        columns=("layer", "pair", "before", "after", "change"),
        rows=tuple(rows),
        signed=("change",),
    )
