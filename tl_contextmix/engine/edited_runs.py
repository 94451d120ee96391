"""Runs of a model with components replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tl_contextmix.adapters.passes import Pass
from tl_contextmix.adapters.questions import Question
from tl_contextmix.core.blocks import Trace
from tl_contextmix.core.model_view import Edit, ModelView
from tl_contextmix.engine.selection import Sublayer, every_place
from tl_contextmix.results.components import Components

Replacement = Literal["zero", "mean"]


@dataclass(frozen=True)
class Ablation:
    """Runs of the model with components replaced.

    Attributes:
        forward_pass: The pass that is run again.
        question: What is read from it.
        everywhere: Whether they are replaced at all positions.
        others: Whether all but them are replaced, what enters the stacks included.
    """

    forward_pass: Pass
    question: Question
    everywhere: bool = False
    others: bool = False

    def before(self, sets: list[Components]) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Returns the logits of the model as it is, and the means of what is to be replaced.

        Means are over the real tokens of the input, those of each sentence once, at however many
        positions it is asked about.
        """
        sentences = self.question.sentences.tolist()
        once = [sentences.index(sentence) for sentence in dict.fromkeys(sentences)]
        touched = [
            one
            for one in every_place(self.forward_pass.view)
            if any(self._touches(one, some) for some in sets)
        ]
        trace = self.forward_pass.rerun([one.name for one in touched])
        means = {}
        for one in touched:
            stack = "encoder" if one.kind.startswith("encoder ") else self.forward_pass.stack
            values, real = one.values(trace)[once], trace.batch.side(stack).mask[once]
            means[one.place] = values[real.to(values.device)].mean(dim=0)
        return self._read(trace), means

    def run(self, some: Components, filling: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Returns the logits with components replaced by means, or by zero where there are none."""
        edits: dict[str, Edit] = {}
        changes: dict[str, list[tuple[Sublayer, Edit]]] = {}
        for one in every_place(self.forward_pass.view):
            if self._touches(one, some):
                edit = self._edit(one, some, filling.get(one.place, one.constant))
                changes.setdefault(one.name, []).append((one, edit))
        for name, pairs in changes.items():
            ff = pairs[0][0].feed_forward
            edits |= {name: pairs[0][1]} if ff is None else ff.edits_by(partial(_changed, pairs))
        return self._read(self.forward_pass.rerun(edits=edits))

    def _touches(self, one: Sublayer, some: Components) -> bool:
        return self.others or bool(one.holds(some).any())

    def _read(self, trace: Trace) -> Tensor:
        """Returns the logits of each prediction, in the dtype of the maths."""
        assert trace.logits is not None
        each = torch.arange(len(self.question.rows))
        return replace(self.question, sentences=each).read(trace.logits)

    def _edit(self, one: Sublayer, some: Components, filling: Tensor | None) -> Edit:
        mine = one.holds(some)

        def edit(activation: Tensor) -> Tensor:
            # Positions that are all alike are one.
            length = 1 if self.everywhere else activation.shape[1]
            gone = torch.zeros(activation.shape[0], length, *activation.shape[2:]).bool()
            for inside in (mine & (some.neuron >= 0), mine & (some.neuron < 0)):
                row = inside.nonzero()[:, 0]
                place = [row, torch.zeros_like(row) if self.everywhere else some.pos[inside]]
                names = (
                    n for n in ("head", "neuron") if bool((getattr(some, n)[inside] >= 0).any())
                )
                gone[(*place, *(getattr(some, name)[inside] for name in names))] = True
            new = torch.zeros((), device=activation.device, dtype=activation.dtype)
            new = new if filling is None else filling.to(activation)
            return torch.where((gone != self.others).to(activation.device), new, activation)

        return edit


def _changed(pairs: list[tuple[Sublayer, Edit]], activation: Tensor) -> Tensor:
    """Returns the neurons of a sublayer with those of some of its experts edited."""
    new = activation.clone()
    for one, edit in pairs:
        new[..., one.columns] = edit(activation[..., one.columns])
    return new


def run_bytes(forward_pass: Pass) -> int:
    """Returns about how much memory a run of the batch takes."""
    longest = max(tokens.shape[1] for tokens in forward_pass.tokens.values())
    return len(forward_pass.batch.main.ids) * row_bytes(forward_pass.view, longest, longest)


def row_bytes(view: ModelView, targets: int, sources: int) -> int:
    """Returns about how much memory a sentence takes of which some positions run."""
    logits, largest = 2 * targets * view.d_vocab, 0
    for _, block in view.every_block():
        pairs = sum(4 * len(a.W_O) * sources for a in block.attentions)
        neurons = 0 if block.feed_forward is None else 4 * block.feed_forward.width
        largest = max(largest, targets * (pairs + neurons))
    return (logits + largest) * view.dtype.itemsize
