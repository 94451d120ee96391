"""The report's sections on maps: which tokens were mixed where."""

from __future__ import annotations

from dataclasses import replace

import torch

from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.plotting import Opening, Section
from tl_contextmix.plotting.panels import Heatmap, Panel
from tl_contextmix.reporting.drawing import largest, quoted, quoted_at, shares, stands_out, table_of
from tl_contextmix.reporting.story import Story

_SCOPES = {
    "attn_out": (
        "attention",
        "The output of the attention sublayer, before the residual.",
        "attention output",
    ),
    "resid_mid": (
        "attention + residual",
        "With the token's residual stream added.",
        "stream after attention",
    ),
    "mlp_in": (
        "input of the feed-forward block",
        "After the layer norm before it.",
        "feed-forward input",
    ),
    "mlp_out": (
        "output of the feed-forward block",
        "The parts carried through its neurons.",
        "feed-forward output",
    ),
    "resid_post": ("feed-forward + residual", "With the residual stream added.", "output"),
    "block_out": ("whole block", "The input of the next layer.", "output"),
}


def mixing(story: Story) -> Section:
    """Returns maps of the blocks' outputs by two methods, and rolled out over layers."""
    panels = _maps(story)
    finding, opens = "", None
    if story.focus is not None:
        row, finding, opens = _focus(story)
        panels.append(row)
    panels.append(_ratios(story))
    text = (
        "Norm maps decompose every vector exactly into parts, one per source token; a cell is the "
        "norm of a part. Value Zeroing measures instead how far the vector moves when a token's "
        "values are set to zero. Its cosine distance is quadratic in small changes, so its rows "
        "look sharper. Both cover one layer, whose inputs are already mixed; the rollout "
        "multiplies layers. None of them shows that a token matters for the answer: large parts "
        "can cancel, and moving a vector need not change the prediction."
    )
    citation = sources(
        "kobayashi2020attention",
        "kobayashi2021incorporating",
        "kobayashi2024analyzing",
        "mohebbi2023quantifying",
        "abnar2020quantifying",
        "modarressi2022globenc",
    )
    title = "Which tokens were mixed, and where?"
    return Section(title, text, tuple(panels), citation, finding, opens)


def points(story: Story) -> Section:
    """Returns the map at every point of the block, in order of computation."""
    maps = dict(story.maps)
    same = {"resid_post", "block_out"} <= set(maps) and torch.equal(
        maps["resid_post"].scores, maps["block_out"].scores
    )
    if same:
        del maps["block_out"]
    panels = []
    for point, map in maps.items():
        name, meaning, _ = _SCOPES[point]
        title = f"{name.capitalize()} ({point})"
        if same and point == "resid_post":
            title = "Whole block (resid_post, here the same as block_out)"
        panels.append(shares(map, title, meaning))
    text = (
        "The same sentence at every point of a block, in order of computation. A cell is the norm "
        "of the column token's part in the row token's vector; parts and bias sum to the model's "
        "own vector exactly. A norm measures how much is there, not what it does."
    )
    if story.missing:
        text += f" Some points are missing: {story.missing}"
    citation = sources(
        "kobayashi2020attention", "kobayashi2021incorporating", "kobayashi2024analyzing"
    )
    return Section("How do tokens mix, point by point?", text, tuple(panels), citation)


def _maps(story: Story) -> list[Panel]:
    """Returns maps of single layers, then their rollout."""
    panels: list[Panel] = []
    if story.last_point != "attn_out":
        caption = "Norms of each token's part in the attention output, before the residual."
        panels.append(shares(story.maps["attn_out"], "Attention output by source", caption))
    panels.append(
        shares(
            story.maps[story.last_point],
            f"Each layer's {_SCOPES[story.last_point][2]} by source",
            "Norms of the parts. Rows are target tokens, columns source tokens.",
        )
    )
    if story.complete:
        map = value_zeroing(story.model, story.text, stack=story.stack)
        caption = "How far the target's output moves when the source's values are set to zero."
        panels.append(shares(map, "Value Zeroing", caption))
    return [*panels, _rolled(story)]


def _focus(story: Story) -> tuple[Heatmap, str, Opening]:
    """Returns the predicting token's row in every layer, its largest entry, and where that is."""
    focus, map = story.focus, story.last
    assert focus is not None
    if story.stack is not None:  # an encoder-decoder's: the decoder's
        map = attention_norms(story.model, story.text).normalize()
    row, sources_ = map.scores[0, :, 0, focus], map.source.strings[0]
    here = story.forward_pass.target.strings[0][focus]
    panel = table_of(
        row,
        [f"layer {layer}" for layer in map.layers],
        sources_,
        title=f"Sources of {quoted(here)} by layer",
        caption=f"The row of the predicting position in the {_SCOPES[map.point][2]}.",
        unit="share of row",
    )
    layer, source = largest(row, skip=focus)
    share, here = float(row[layer, source]), quoted(here)
    name = quoted_at(sources_, source)
    rest = [float(value) for place, value in enumerate(row[layer]) if place != focus]
    finding = f"In layer {map.layers[layer]}, {share:.0%} of {here} comes from {name}."
    if stands_out(rest) is None:
        finding = (
            f"No single source stands out for {here}: the largest share is {share:.0%}, of {name} "
            f"in layer {map.layers[layer]}."
        )
    # Maps of an encoder have other tokens.
    position = map.target.labels()[focus] if story.stack is None else None
    return panel, finding, Opening(map.layers[layer], position)


def _ratios(story: Story) -> Heatmap:
    """Returns the mixing ratio of every token in every layer."""
    figures = mixing_ratio(story.model, story.text, at=story.last_point, stack=story.stack)
    return table_of(
        figures.values[0],
        [f"layer {layer}" for layer in figures.layers],
        figures.tokens.strings[0],
        title="Mixing ratio of each token",
        caption="Norm of what comes from other tokens, relative to the sum of that and the norm of "
        "what the token keeps. 0.5: equal.",
        unit="mixing ratio",
    )


def _rolled(story: Story) -> Heatmap:
    """Returns the rollouts, the one over all layers first."""
    rolled = story.last.rollout()
    panel = rolled.panels()[0]
    assert isinstance(panel, Heatmap)
    return replace(
        panel,
        title="Rollout from the input",
        caption="The product of single-layer maps: an estimate of how much of each input token "
        "remains. The first map covers all layers, later ones fewer.",
        values=panel.values.flip(0),
        layers=tuple(reversed(panel.layers)),
        sheets=tuple(f"0 to {layer}" for layer in reversed(rolled.layers)),
        unit="share of row",
    )
