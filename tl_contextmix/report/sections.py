"""The sections of a report: what to look at, one sentence on what is there, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tl_contextmix.inputs import package_version
from tl_contextmix.methods.changes import amplified_pairs, cancellation, contextualization_change
from tl_contextmix.methods.ff_memories import ff_memories
from tl_contextmix.methods.log_prob import log_prob_contributions
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.readouts import component_readouts
from tl_contextmix.methods.token_memory import token_memory
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.panels import Bars, Heatmap, Panel, Table
from tl_contextmix.render import Section
from tl_contextmix.report.layers import decoder_lens_section
from tl_contextmix.report.story import Story
from tl_contextmix.results import LayerFigures

_PREDICTIONS = 5
_PAIRS = 3
_PARTS = 10
_MEMORIES = 3

_NORMS = (
    "Kobayashi, Kuribayashi, Yokoi, Inui: Attention is Not Only a Weight (EMNLP 2020); "
    "Incorporating Residual and Normalization Layers into Analysis of Masked Language Models "
    "(EMNLP 2021); Analyzing Feed-Forward Blocks in Transformers through the Lens of Attention "
    "Maps (ICLR 2024)."
)
_CHANGES = (
    "Kobayashi, Kuribayashi, Yokoi, Inui: Analyzing Feed-Forward Blocks in Transformers through "
    "the Lens of Attention Maps (ICLR 2024)."
)
_RATIO = (
    "Kobayashi, Kuribayashi, Yokoi, Inui: Incorporating Residual and Normalization Layers into "
    "Analysis of Masked Language Models (EMNLP 2021)."
)
_ZEROING = (
    "Mohebbi, Zuidema, Chrupala, Alishahi: Quantifying Context Mixing in Transformers (EACL 2023)."
)
_FF_MEMORIES = (
    "Geva, Schuster, Berant, Levy: Transformer Feed-Forward Layers Are Key-Value Memories "
    "(EMNLP 2021)."
)
_ROLLOUT = (
    "Abnar, Zuidema: Quantifying Attention Flow in Transformers (ACL 2020); Modarressi, Fayyaz, "
    "Yaghoobzadeh, Pilehvar: GlobEnc (NAACL 2022)."
)

_LOG_PROB = (
    "Yu, Ananiadou: Exploring the Residual Stream of Transformers (2023); Neuron-Level Knowledge "
    "Attribution in Large Language Models (EMNLP 2024)."
)

_SCOPES = {
    "attn_out": ("attention", "What the attention sublayer writes, before anything is added."),
    "resid_mid": ("attention + residual", "With the token's own residual stream added."),
    "mlp_in": ("what the feed-forward block reads", "After the layer norm in front of it."),
    "mlp_out": ("what the feed-forward block writes", "The same split, through its neurons."),
    "resid_post": ("feed-forward + residual", "Added back to the stream that went past it."),
    "block_out": ("the whole block", "What the next layer gets."),
}


def facts(story: Story) -> tuple[tuple[str, str], ...]:
    """Returns what the report is about, as names and values."""
    view = story.done.view
    facts = [
        ("Text", story.text),
        ("Model", view.name),
        ("Class", f"{view.host}, TransformerLens {view.host_version}"),
        ("Weights", ", ".join(view.processing) or "as published"),
        ("tl_contextmix", package_version()),
    ]
    if story.stack == "encoder":
        facts.insert(3, ("Maps of", "the encoder"))
    return tuple(facts)


def _predictions(story: Story) -> Section | None:
    """The most probable tokens, and what the position they are read from is made of."""
    view, logits, focus = story.done.view, story.done.trace.logits, story.focus
    if focus is None or logits is None or view.readout.refusal:
        return None
    found = logits[0, focus].detach().float().softmax(-1).topk(_PREDICTIONS)
    probabilities, tokens = found.values.tolist(), found.indices.tolist()
    rows = tuple(
        (view.to_string(token), probability)
        for token, probability in zip(tokens, probabilities, strict=True)
    )
    here = story.done.target.strings[0][focus]
    preposition = "after" if "decoder" in view.stacks else "at"
    table = Table(
        title=f"Most probable tokens {preposition} {_quoted(here)}",
        caption="The probabilities of the model itself.",
        columns=("token", "probability"),
        rows=rows,
    )
    map = (
        story.last if story.stack is None else attention_norms(story.model, story.text).normalize()
    )
    shares = map.scores[0, :, 0, focus]
    sources = map.source.strings[0]
    panel = _by_layer(
        shares,
        map.layers,
        sources,
        title=f"What {_quoted(here)} is made of, layer by layer",
        caption="How each layer's output at this token splits over the tokens the layer read, as "
        "shares of a row. Not an effect on the prediction: a layer reads vectors that hold "
        "other tokens already, see the rollout.",
        unit="share of row",
    )
    layer, source = _largest(shares, leave_out=focus)
    share = float(shares[layer, source])
    finding = (
        f"{preposition.capitalize()} {_quoted(here)} the model says {_quoted(rows[0][0])} "
        f"({probabilities[0]:.0%}). In layer {map.layers[layer]}, {share:.0%} of {_quoted(here)} "
        f"comes from {_quoted(sources[source])}."
    )
    text = "The model's own answer, and what the vector that it is read from is made of."
    return Section("What the model predicts, and from where", text, (table, panel), "", finding)


def _contributions(story: Story) -> Section | None:
    """Which sublayers, sources and neurons wrote the answer, and what they speak for."""
    view, focus = story.done.view, story.focus
    if focus is None or view.readout.refusal:
        return None
    layers, sources = (
        log_prob_contributions(story.model, story.text, by=by, pos=focus)
        for by in ("layer", "position")
    )
    # Where logits are no sums, finding the best neurons takes evaluating all of them.
    linear = view.readout.head is None and view.readout.soft_cap is None
    neurons = linear and view.blocks()[0].feed_forward is not None
    by, top_k = ("ff_neuron", _PARTS) if neurons else ("head", None)
    parts = log_prob_contributions(story.model, story.text, by=by, pos=focus, top_k=top_k)
    readouts = component_readouts(story.model, story.text, components=parts.top(_PARTS))
    table = replace(
        readouts.panels()[0],
        title=f"The {_PARTS} {'feed-forward neurons' if neurons else 'heads'} that raise it most",
    )
    grids = [p for p in (*layers.panels(), *sources.panels()) if isinstance(p, Heatmap)]
    trajectory = next(panel for panel in layers.panels() if isinstance(panel, Bars))
    best, source = layers.top(1), sources.top(1)
    word = source.to_dataframe().source_token[0]
    finding = (
        f"{_quoted(layers.target.strings[0][0])} comes most from {best.labels()[0]} "
        f"({float(best.scores[0, 0]):+.2f} nats); of all tokens read, most from {_quoted(word)} in "
        f"layer {int(source.components.layer[0, 0])} ({float(source.scores[0, 0]):+.2f})."
    )
    text = (
        "How much each part of the vector that the answer is read from raises the answer's "
        "log-probability, added to what was there before it. Scores of sublayers add up to the "
        "log-probability exactly; those of sources and neurons are each taken alone."
    )
    return Section(
        "Which components wrote the answer", text, (trajectory, *grids, table), _LOG_PROB, finding
    )


def _scopes(story: Story) -> Section:
    """The map of every point of the block, side by side."""
    maps = dict(story.maps)
    same = {"resid_post", "block_out"} <= set(maps) and torch.equal(
        maps["resid_post"].scores, maps["block_out"].scores
    )
    if same:
        del maps["block_out"]
    panels = []
    for point, map in maps.items():
        name, meaning = _SCOPES[point]
        panel = map.normalize().panels()[0]
        assert isinstance(panel, Heatmap)
        title = f"{point}: {name}"
        if same and point == "resid_post":
            title = "resid_post = block_out: the whole block"
        caption = f"{meaning} Each row is divided by its sum."
        panels.append(replace(panel, title=title, caption=caption, unit="share of row"))
    text = (
        "The same sentence at every point of a block, in the order data flows. A cell is the norm "
        "of the part that the column's token has in the row's vector; the parts add up to the "
        "model's own vector exactly. A norm says how much is there, not what it does."
    )
    if story.missing:
        text += f" Some points are left out: {story.missing}"
    return Section("How tokens mix, point by point", text, tuple(panels), _NORMS)


def _changes(story: Story) -> Section | None:
    """How much each component changes the map, and whether the block undoes it."""
    if not story.complete:
        return None
    change, undone = contextualization_change(story.maps), cancellation(story.maps)
    # The third figure, a ratio of norms, has another scale.
    undone = replace(
        _only(undone, ("cancel", "recover")),
        caption="cancel below 0: what follows moves the map against FF's change (a cosine). "
        "recover above 0: the block's map is nearer to the one before FF (a difference of rank "
        "correlations).",
    )
    panels = (*change.panels(), *undone.panels())
    layer, quantity = _largest(change.values[0])
    finding = (
        f"The largest change: {change.quantities[quantity]} in layer {change.layers[layer]} "
        f"({float(change.values[0, layer, quantity]):.3f})."
    )
    text = (
        "FF is the feed-forward block, RES the residual sum, LN the layer norm. The first chart "
        "compares the order of token pairs before and after each component; it does not see a "
        "change that leaves the order alone. The second asks whether what FF changed is undone."
    )
    return Section("What each component changes", text, panels, _CHANGES, finding)


def _pairs(story: Story) -> Section | None:
    """The pairs that the feed-forward block amplifies and suppresses most."""
    if not story.complete:
        return None
    pairs = amplified_pairs(story.maps["mlp_in"], story.maps["mlp_out"], k=_PAIRS)
    finding = ""
    if pairs.amplified:
        top = max(pairs.amplified, key=lambda pair: pair.change)
        finding = (
            f"Most amplified: {_quoted(top.source_token)} for {_quoted(top.target_token)} in layer "
            f"{top.layer}, from {top.before:.0%} to {top.after:.0%} of the row."
        )
    text = (
        f"The {_PAIRS} pairs per layer whose share of their row grew and shrank most from what the "
        "feed-forward block reads (mlp_in) to what it writes (mlp_out). The residual sum that "
        "follows may hide it again, see above."
    )
    title = "Pairs the feed-forward block changes most"
    panels = (*map(_without_sentence, pairs.panels()), _difference(story))
    return Section(title, text, panels, _CHANGES, finding)


def _without_sentence(panel: Panel) -> Panel:
    """Returns a table of pairs without the column that counts sentences; there is one."""
    assert isinstance(panel, Table)
    assert panel.columns[0] == "sentence"
    return replace(panel, columns=panel.columns[1:], rows=tuple(row[1:] for row in panel.rows))


def _difference(story: Story) -> Heatmap:
    """The map behind the feed-forward block minus the map in front of it."""
    before, after = story.maps["mlp_in"].normalize(), story.maps["mlp_out"].normalize()
    panel = after.panels()[0]
    assert isinstance(panel, Heatmap)
    return replace(
        panel,
        title="mlp_out minus mlp_in",
        caption="Blue pairs are amplified, red ones suppressed. Rows of either map sum to 1.",
        values=(after.scores - before.scores).detach().cpu().flatten(1, 2)[0],
        unit="share of row",
    )


def _ratios(story: Story) -> Section:
    """The mixing ratio of every token in every layer."""
    figures = mixing_ratio(story.model, story.text, at=story.last_point, stack=story.stack)
    panel = _by_layer(
        figures.values[0],
        figures.layers,
        figures.tokens.strings[0],
        title=figures.title,
        caption=figures.caption,
        unit=figures.unit,
    )
    layer, token = _largest(figures.values[0])
    finding = (
        f"Most from others: {_quoted(panel.columns[token])} in layer {figures.layers[layer]} "
        f"({float(figures.values[0, layer, token]):.2f})."
    )
    text = (
        "How much of a token's vector one layer took from other tokens, by the norm of their sum: "
        "0.5 where what comes from others weighs as much as what the token kept."
    )
    return Section("How much each token mixes", text, (panel,), _RATIO, finding)


def _zeroing(story: Story) -> Section | None:
    """What each block's output loses without one token's value."""
    if not story.complete:
        return None
    map = value_zeroing(story.model, story.text, stack=story.stack).normalize()
    panel = map.panels()[0]
    assert isinstance(panel, Heatmap)
    panel = replace(
        panel,
        title="Value Zeroing",
        caption="How far the row's output moves when the column's value is zero. Each row is "
        "divided by its sum.",
        unit="share of row",
    )
    finding = ""
    if story.focus is not None and story.stack is None:
        layer, source = _largest(map.scores[0, :, 0, story.focus], leave_out=story.focus)
        words = map.source.strings[0]
        finding = (
            f"{_quoted(words[story.focus])} loses most without {_quoted(words[source])}: "
            f"{float(map.scores[0, layer, 0, story.focus, source]):.0%} of its row in layer "
            f"{map.layers[layer]}."
        )
    text = (
        "Another question to the same blocks: not how much of a token is there, but what the "
        "block's output loses when the value vectors of one token are set to zero. Distances are "
        "cosines, which grow with the square of a small change: a row looks sharper than one of "
        "norms. Which of the two to believe is what `tl-contextmix compare` measures."
    )
    return Section("What each layer loses without a token", text, (panel,), _ZEROING, finding)


def _rollout(story: Story) -> Section:
    """The map multiplied through the layers."""
    rolled = story.last.rollout()
    panel = rolled.panels()[0]
    assert isinstance(panel, Heatmap)
    panel = replace(
        panel,
        title="Rollout of the whole block",
        caption="From the input tokens through all layers; the further maps stop earlier.",
        values=panel.values.flip(0),
        sheets=tuple(f"0 to {layer}" for layer in reversed(rolled.layers)),
        unit="share of row",
    )
    text = (
        "Maps of single layers multiplied: an estimate of how much of each input token is left in "
        "each vector. It multiplies norms, so what cancels between layers is not seen."
    )
    return Section("From the input through all layers", text, (panel,), _ROLLOUT)


def _memories(story: Story) -> Section | None:
    """The memories that write most at the position that predicts, and which token feeds them."""
    view, focus = story.done.view, story.focus
    if not story.complete or focus is None or story.stack is not None or view.readout.refusal:
        return None
    found = ff_memories(story.model, story.text)
    top = found.top(_MEMORIES, pos=focus)
    chosen = sorted(set(top["neuron"]))
    fed = token_memory(story.model, story.text, pos=focus, neurons=chosen)
    words = fed.source.strings[0]
    rows = []
    for row in top.itertuples():
        shares = fed.shares[0, fed.layers.index(row.layer), 0, :, chosen.index(row.neuron)]
        source = int(shares.abs().argmax())
        name = f"L{row.layer}.{row.neuron}"
        share = float(shares[source])
        rows.append((name, row.promotes, row.coefficient, row.length, words[source], share))
    table = Table(
        title=f"Memories at {_quoted(words[focus])}",
        caption=f"The {_MEMORIES} memories of each layer that add the longest vectors: the token "
        "the value promotes, its coefficient, the length it adds, and the token with the largest "
        "share in the coefficient, beside that share.",
        columns=("memory", "promotes", "coefficient", "length", "fed most by", "share"),
        rows=tuple(rows),
        signed=("coefficient", "share"),
    )
    longest = max(rows, key=lambda row: row[3])
    finding = (
        f"The longest vector is that of {longest[0]}: it promotes {_quoted(longest[1])} and is fed "
        f"most by {_quoted(longest[4])}."
    )
    text = (
        "A feed-forward block is the sum of its neurons' value vectors, each times a coefficient. "
        "A memory is read here by what its value would say alone; the charts count, over the "
        "positions of this sentence, whose top token each layer ends up with. What excites a "
        "memory over a whole corpus is what `tl-contextmix mine` finds."
    )
    cases = found.figures().panels()[-1]
    return Section("Which memories write here", text, (table, cases), _FF_MEMORIES, finding)


SECTIONS: dict[str, Callable[[Story], Section | None]] = {
    "predictions": _predictions,
    "contributions": _contributions,
    "scopes": _scopes,
    "changes": _changes,
    "pairs": _pairs,
    "mixing ratio": _ratios,
    "value zeroing": _zeroing,
    "memories": _memories,
    "rollout": _rollout,
    "decoder lens": decoder_lens_section,
}


def _by_layer(
    values: torch.Tensor,
    layers: Sequence[int],
    tokens: Sequence[str],
    *,
    title: str,
    caption: str,
    unit: str,
) -> Heatmap:
    """Returns a map of layers by tokens."""
    return Heatmap(
        title=title,
        caption=caption,
        values=values[None].detach().cpu(),
        sheets=(title,),
        rows=tuple(f"layer {layer}" for layer in layers),
        columns=tuple(tokens),
        unit=unit,
    )


def _only(figures: LayerFigures, quantities: tuple[str, ...]) -> LayerFigures:
    """Returns some of the quantities, for those on one scale to share a chart."""
    places = [figures.quantities.index(name) for name in quantities]
    return replace(figures, values=figures.values[:, :, places], quantities=quantities)


def _largest(values: torch.Tensor, leave_out: int | None = None) -> tuple[int, int]:
    """Returns row and column of the largest number; NaN and one column may be left out."""
    kept = values.detach().cpu().nan_to_num(-1.0).clone()
    if leave_out is not None and kept.shape[1] > 1:
        kept[:, leave_out] = -1.0
    return divmod(int(kept.argmax()), kept.shape[1])


def _quoted(token: str) -> str:
    return f"“{token.strip() or token}”"
