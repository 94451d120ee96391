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
from tl_contextmix.reporting.drawing import largest, only, quoted, shares
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import LayerFigures, Pair, PairChanges

_PAIRS = 2


def feed_forward(story: Story) -> Section | str:
    """Returns the maps around the feed-forward block, what changed, and what was undone."""
    if not story.complete:
        return story.missing
    change, undone = contextualization_change(story.maps), cancellation(story.maps)
    # The third figure, a ratio of norms, has another scale.
    undone = replace(
        only(undone, ("cancel", "recover")),
        caption="cancel below 0: what follows moves the map against FF's change (a cosine). "
        "recover above 0: the block's map is nearer to the one before FF (a difference of rank "
        "correlations).",
    )
    pairs = amplified_pairs(story.maps["mlp_in"], story.maps["mlp_out"], k=_PAIRS)
    panels = (*change.panels(), *undone.panels(), _difference(story), _table(pairs))
    finding = _largest_change(change)
    if pairs.amplified:
        top = max(pairs.amplified, key=lambda pair: pair.change)
        finding += (
            f" Most amplified: {quoted(top.source_token)} for {quoted(top.target_token)} in layer "
            f"{top.layer}, from {top.before:.0%} to {top.after:.0%} of the row."
        )
    text = (
        "FF is the feed-forward block, RES the residual sum, LN the layer norm. The first chart "
        "compares the order of token pairs before and after each component; it does not see a "
        "change that leaves the order alone. The second asks whether what follows undoes what FF "
        "changed: where it does, an amplified pair is hidden again in the block's output. The map "
        "after FF passes each neuron's activation by integrated gradients from zero, which is "
        "exact in sum and a convention in how the sum is split."
    )
    title = "What did the feed-forward block change?"
    return Section(title, text, panels, sources("kobayashi2024analyzing"), finding)


def _largest_change(change: LayerFigures) -> str:
    layer, quantity = largest(change.values[0])
    return (
        f"The largest change: {change.quantities[quantity]} in layer {change.layers[layer]} "
        f"({float(change.values[0, layer, quantity]):.3f})."
    )


def _difference(story: Story) -> Heatmap:
    """Returns the map behind the feed-forward block minus the map in front of it."""
    after = shares(story.maps["mlp_out"], "Share after FF minus before (mlp_out - mlp_in)", "")
    before = story.maps["mlp_in"].normalize()
    return replace(
        after,
        caption="Blue pairs are amplified, red ones suppressed. Rows of either map sum to 1.",
        values=after.values - before.scores.detach().cpu().flatten(1, 2)[0],
    )


def _table(pairs: PairChanges) -> Table:
    """Returns the pairs of each layer, those that grew most and those that shrank most."""
    rows = [
        (pair.layer, _name(pair), pair.before, pair.after, pair.change)
        for pair in sorted((*pairs.amplified, *pairs.suppressed), key=_by_layer)
    ]
    return Table(
        title="Pairs the feed-forward block changes most",
        caption=f"The {_PAIRS} pairs per layer whose share of the target's row grew and shrank "
        "most, source → target.",
        columns=("layer", "pair", "before", "after", "change"),
        rows=tuple(rows),
        signed=("change",),
    )


def _name(pair: Pair) -> str:
    return f"{pair.source_token} ({pair.source}) → {pair.target_token} ({pair.target})"


def _by_layer(pair: Pair) -> tuple[int, float]:
    return pair.layer, -pair.change
