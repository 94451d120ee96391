"""The report's first section: what the model predicts."""

from __future__ import annotations

import math

import torch

from tl_contextmix.methods.log_prob.contributions import log_prob_contributions
from tl_contextmix.plotting import Section
from tl_contextmix.plotting.panels import Bars, Panel, Table
from tl_contextmix.reporting.drawing import quoted
from tl_contextmix.reporting.story import Story

_CANDIDATES = 8


def prediction(story: Story) -> Section | str:
    """Returns the most probable tokens, here and at every earlier position."""
    view, logits, focus = story.forward_pass.view, story.forward_pass.trace.logits, story.focus
    if focus is None:
        return "the text has no mask token to predict"
    if logits is None or view.readout.refusal:
        return view.readout.refusal or "the model has no logits"
    probabilities = logits[0].detach().float().softmax(-1)
    found = probabilities[focus].topk(min(_CANDIDATES, probabilities.shape[-1]))
    names = tuple(view.to_output(token) for token in found.indices.tolist())
    here = story.forward_pass.target.strings[0][focus]
    causal = "decoder" in view.stacks
    kind = "classes" if view.classes else "tokens"
    preposition = "after" if causal else "at"
    panels: list[Panel] = [
        Bars(
            title=f"Most probable {kind} {preposition} {quoted(here)}",
            caption="Probabilities from the model's own forward pass.",
            labels=names,
            series=(("probability", tuple(found.values.tolist())),),
            unit="probability",
        )
    ]
    if causal and focus > 0:
        panels.append(_expected(story, probabilities))
    share = float(found.values[0])
    finding = f"{preposition.capitalize()} {quoted(here)} the model predicts {quoted(names[0])}"
    if len(names) > 1:
        finding += f" ({share:.0%}; then {quoted(names[1])}, {float(found.values[1]):.0%})"
    if story.answer.foil is not None:
        finding += f". {_lead(story)}"
    text = (
        "The rest of the page explains this answer. A probability is the model's confidence; it "
        "says neither whether the answer is right nor why. The next sections trace where the "
        "information came from, what the feed-forward layers did with it, and which components "
        "wrote the answer."
    )
    return Section("What does the model predict?", text, tuple(panels), finding=f"{finding}.")


def _lead(story: Story) -> str:
    """Returns how far the target is ahead of its foil, in words."""
    layers = log_prob_contributions(story.model, story.text, **vars(story.answer))
    odds = float(layers.log_prob[0])
    asked, times = layers.asked(quote=quoted), math.exp(abs(odds))
    return (
        f"The page asks why {asked}: the first is {times:.3g} times "
        f"{'more' if odds >= 0 else 'less'} probable than the second ({odds:+.2f} nats)"
    )


def _expected(story: Story, probabilities: torch.Tensor) -> Table:
    """Returns what the model expected after each token, and the actual next token."""
    view, tokens = story.forward_pass.view, story.forward_pass.target
    rows = []
    for place, word in enumerate(tokens.strings[0][:-1]):
        best = int(probabilities[place].argmax())
        actual = int(tokens.ids[0, place + 1])
        rows.append(
            (
                word,
                view.to_output(best),
                float(probabilities[place, best]),
                tokens.strings[0][place + 1],
                float(probabilities[place, actual]),
            )
        )
    return Table(
        title="Predictions along the text",
        caption="After each token: the top prediction, and the actual next token.",
        columns=("after", "predicted", "probability", "actual", "its probability"),
        rows=tuple(rows),
    )
