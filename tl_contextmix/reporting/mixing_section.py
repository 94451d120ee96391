"""The report's sections on maps: which tokens were mixed where."""

from __future__ import annotations

from dataclasses import replace

import torch

from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Heatmap, Panel
from tl_contextmix.reporting.drawing import largest, layer_names, quoted, shares, table_of
from tl_contextmix.reporting.story import Story
from tl_contextmix.results import ContextMap

_SCOPES = {
    "attn_out": ("attention", "What the attention sublayer writes, before anything is added."),
    "resid_mid": ("attention + residual", "With the token's own residual stream added."),
    "mlp_in": ("what the feed-forward block reads", "After the layer norm in front of it."),
    "mlp_out": ("what the feed-forward block writes", "The same split, through its neurons."),
    "resid_post": ("feed-forward + residual", "Added back to the stream that went past it."),
    "block_out": ("the whole block", "What the next layer gets."),
}


def mixing(story: Story) -> Section:
    """Returns what the blocks' outputs are made of, by two methods, and through all layers."""
    panels = _maps(story)
    finding = ""
    if story.focus is not None:
        row, finding = _focus(story)
        panels.append(row)
    panels.append(_ratios(story))
    text = (
        "A map of norms splits every vector exactly into parts, one per token read; a cell "
        "is the norm of a part. Value Zeroing asks another question: how far the vector moves when "
        "a token's values are set to zero. Its cosine distance grows with the square of a small "
        "change, so its rows look sharper. Both look at one layer, whose tokens are mixtures "
        "already; the rollout multiplies layers. None of them says that a token matters for the "
        "answer: parts can be large and cancel, and what moves a vector need not move a word."
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
    return Section(title, text, tuple(panels), citation, finding)


def points(story: Story) -> Section:
    """Returns the map of every point of the block, in the order data flows."""
    maps = dict(story.maps)
    same = {"resid_post", "block_out"} <= set(maps) and torch.equal(
        maps["resid_post"].scores, maps["block_out"].scores
    )
    if same:
        del maps["block_out"]
    panels = []
    for point, map in maps.items():
        name, meaning = _SCOPES[point]
        title = f"{point}: {name}"
        if same and point == "resid_post":
            title = "resid_post = block_out: the whole block"
        panels.append(shares(map, title, meaning))
    text = (
        "The same sentence at every point of a block, in the order data flows. A cell is the norm "
        "of the part that the column's token has in the row's vector; the parts add up to the "
        "model's own vector exactly. A norm says how much is there, not what it does."
    )
    if story.missing:
        text += f" Some points are left out: {story.missing}"
    citation = sources(
        "kobayashi2020attention", "kobayashi2021incorporating", "kobayashi2024analyzing"
    )
    return Section("How do tokens mix, point by point?", text, tuple(panels), citation)


def _maps(story: Story) -> list[Panel]:
    """Returns the maps of one layer each, then the one through all of them."""
    panels: list[Panel] = []
    if story.last_point != "attn_out":
        caption = "Norms of what attention brings, before the residual stream is added."
        panels.append(shares(story.maps["attn_out"], "What attention brings (attn_out)", caption))
    panels.append(
        shares(
            story.maps[story.last_point],
            f"What each layer's output is made of ({story.last_point})",
            "Norms of the parts. Row: the token that is written; column: the token it is from.",
        )
    )
    if story.complete:
        map = value_zeroing(story.model, story.text, stack=story.stack)
        caption = "How far the row's output moves when the column's value is zero."
        panels.append(shares(map, "What each layer's output loses (Value Zeroing)", caption))
    return [*panels, _rolled(story)]


def _focus(story: Story) -> tuple[Heatmap, str]:
    """Returns the predicting token's row in every layer, and what stands out in it."""
    map = _predicting(story)
    focus = story.focus
    assert focus is not None
    row, sources_ = map.scores[0, :, 0, focus], map.source.strings[0]
    here = story.done.target.strings[0][focus]
    panel = table_of(
        row,
        layer_names(map.layers),
        sources_,
        title=f"What {quoted(here)} is made of, layer by layer",
        caption=f"The row of {map.point} that the prediction is read from.",
        unit="share of row",
    )
    layer, source = largest(row, leave_out=focus)
    finding = (
        f"In layer {map.layers[layer]}, {float(row[layer, source]):.0%} of {quoted(here)} comes "
        f"from {quoted(sources_[source])}."
    )
    return panel, finding


def _predicting(story: Story) -> ContextMap:
    """Returns the map with the row that predicts; of an encoder-decoder, the decoder's."""
    if story.stack is None:
        return story.last
    return attention_norms(story.model, story.text).normalize()


def _ratios(story: Story) -> Heatmap:
    """Returns the mixing ratio of every token in every layer."""
    figures = mixing_ratio(story.model, story.text, at=story.last_point, stack=story.stack)
    return table_of(
        figures.values[0],
        layer_names(figures.layers),
        figures.tokens.strings[0],
        title="How much each token mixes",
        caption="Norm of all that comes from others, over that and the norm of what the token "
        "kept. 0.5: both weigh the same.",
        unit="mixing ratio",
    )


def _rolled(story: Story) -> Heatmap:
    """Returns the map multiplied through the layers, all layers first."""
    rolled = story.last.rollout()
    panel = rolled.panels()[0]
    assert isinstance(panel, Heatmap)
    return replace(
        panel,
        title="From the input through all layers (rollout)",
        caption="Maps of single layers multiplied: an estimate of how much of each input token is "
        "left. The further maps stop earlier.",
        values=panel.values.flip(0),
        sheets=tuple(f"0 to {layer}" for layer in reversed(rolled.layers)),
        unit="share of row",
    )
