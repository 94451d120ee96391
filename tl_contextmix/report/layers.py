"""The section of an encoder-decoder's report: what its decoder says after each encoder layer."""

from __future__ import annotations

from dataclasses import replace

from tl_contextmix.methods.decoder_lens import decoder_lens
from tl_contextmix.panels import Bars, Panel, Table
from tl_contextmix.render import Section
from tl_contextmix.report.story import Story
from tl_contextmix.results import LayerwiseDecoding, LayerwiseLikelihood

_LENS = (
    "Langedijk, Mohebbi, Sarti, Zuidema, Jumelet: DecoderLens: Layerwise Interpretation of "
    "Encoder-Decoder Transformers (Findings of NAACL 2024)."
)


def decoder_lens_section(story: Story) -> Section | None:
    """Returns outputs, judgements and figures by layer, or None for a model with one stack."""
    if len(story.done.view.stacks) != 2:
        return None
    said = decoder_lens(story.model, story.text)
    judged = decoder_lens(story.model, story.text, mode="teacher_forced")
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
    text = (
        "The decoder reads an earlier layer of the encoder instead of the last one: it is the "
        "model with the later encoder blocks removed. Layer 0 is the embeddings. It was trained on "
        "the last layer only, so a layer that it cannot read may still hold the answer."
    )
    finding = f"The output of layer {stable} stays to the end: “{said.texts[0][-1]}”."
    if stable == said.depth:
        finding = f"The output changes up to the last layer: “{said.texts[0][-1]}”."
    return Section("What the decoder says after each layer", text, panels, _LENS, finding)


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
