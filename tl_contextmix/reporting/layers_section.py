"""The report's section on encoder layers: the decoder's output from each of them."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.adapters import as_view
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.citations import sources
from tl_contextmix.methods.decoder_lens.lens import decoder_lens
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Bars, Panel, Table
from tl_contextmix.reporting.story import Story, default_text
from tl_contextmix.results import LayerwiseDecoding, LayerwiseLikelihood


def encoder_layers(story: Story) -> Section | str:
    """Returns outputs, log-probabilities and metrics by layer.

    For a model without an encoder, those of the story's companion, if there is one.
    """
    model, text, about = story.model, story.text, ""
    if isinstance(model, ModelView):
        return "with labels, ask decoder_lens itself"
    if len(story.forward_pass.view.stacks) != 2:
        if story.companion is None:
            return "the model has no encoder and decoder"
        model, text = story.companion, default_text(story.companion)
        own, name = story.forward_pass.view.name, as_view(model).name
        about = f"{own} has no encoder; this is the bundled {name} on “{text}”. "
    decoding = decoder_lens(model, text)
    judged = decoder_lens(model, text, mode="teacher_forced")
    assert isinstance(decoding, LayerwiseDecoding)
    assert isinstance(judged, LayerwiseLikelihood)
    table, map = decoding.panels()[0], judged.panels()[0]
    assert isinstance(table, Table)
    panels: tuple[Panel, ...] = (
        replace(table, title="Output by layer"),
        replace(map, title="Log-probability of the final output by layer"),
        *_charts(decoding, judged),
    )
    stable = decoding.first_stable_layer()[0]
    reading = about + (
        "DecoderLens lets the decoder read an earlier encoder layer, as if the later blocks were "
        "removed. Layer 0 is the embeddings. The decoder was trained on the last layer only, so a "
        "layer that it cannot read may still encode the answer."
    )
    finding = f"The output is stable from layer {stable}: “{decoding.texts[0][-1]}”."
    if stable == decoding.depth:
        finding = f"The output changes until the last layer: “{decoding.texts[0][-1]}”."
    citation = sources("langedijk2024decoderlens")
    title = "What does each encoder layer already know?"
    return Section(title, reading, panels, citation, finding)


def _charts(decoding: LayerwiseDecoding, judged: LayerwiseLikelihood) -> tuple[Panel, ...]:
    """Returns each layer's distance from the final output."""
    words = {
        "edit distance": {
            "title": "Distance from the final output, by layer",
            "caption": "Token substitutions, deletions and insertions from a layer's output to the "
            "final one.",
        },
        "gold NLL": {
            "title": "How improbable the final output is, by layer",
            "caption": "Negative log-likelihood of the final output in nats per token.",
        },
    }
    curves = decoding.metrics(metric="edit distance") + judged.metrics(metric="gold NLL")
    charts = [panel for panel in curves.panels() if isinstance(panel, Bars)]
    return tuple(replace(chart, **words[chart.unit]) for chart in charts)
