"""The report's section on encoder layers: what the decoder says after each of them."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.adapters import as_view
from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.decoder_lens.lens import decoder_lens
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Bars, Panel, Table
from tl_contextmix.reporting.story import Story, default_text
from tl_contextmix.results import LayerwiseDecoding, LayerwiseLikelihood


def encoder_layers(story: Story) -> Section | str:
    """Returns outputs, judgements and figures by layer.

    Of a model without an encoder: those of the story's companion, if it has one.
    """
    model, text, about = story.model, story.text, ""
    if len(story.done.view.stacks) != 2:
        if story.companion is None:
            return "the model has no encoder whose layers its decoder could read"
        model, text = story.companion, default_text(story.companion)
        name = as_view(model).name
        about = f"{story.done.view.name} has no encoder; this is the embedded {name}, on “{text}”. "
    said = decoder_lens(model, text)
    judged = decoder_lens(model, text, mode="teacher_forced")
    assert isinstance(said, LayerwiseDecoding)
    assert isinstance(judged, LayerwiseLikelihood)
    table, map = said.panels()[0], judged.panels()[0]
    assert isinstance(table, Table)
    panels: tuple[Panel, ...] = (
        replace(table, title="Output by layer"),
        replace(map, title="How each layer judges the final output"),
        *_charts(said, judged),
    )
    stable = said.first_stable_layer()[0]
    reading = about + (
        "The decoder reads an earlier layer of the encoder instead of the last one: it is the "
        "model with the later encoder blocks removed. Layer 0 is the embeddings. It was trained on "
        "the last layer only, so a layer that it cannot read may still hold the answer."
    )
    finding = f"The output of layer {stable} stays to the end: “{said.texts[0][-1]}”."
    if stable == said.depth:
        finding = f"The output changes up to the last layer: “{said.texts[0][-1]}”."
    citation = sources("langedijk2024decoderlens")
    title = "What does each encoder layer already know?"
    return Section(title, reading, panels, citation, finding)


def _charts(said: LayerwiseDecoding, judged: LayerwiseLikelihood) -> tuple[Panel, ...]:
    """Returns the curves of one sentence: how far from the final output each layer is."""
    captions = {
        "edit distance": "Tokens to change, leave out or insert, from a layer's output to the "
        "final one.",
        "gold NLL": "Negative log-probability of the final output, nats per token.",
    }
    curves = said.metrics(metric="edit distance") + judged.metrics(metric="gold NLL")
    charts = [panel for panel in curves.panels() if isinstance(panel, Bars)]
    return tuple(replace(chart, title=chart.unit, caption=captions[chart.unit]) for chart in charts)
