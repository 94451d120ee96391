"""The sublayers of a frozen stack as steps: what their nodes write, and what they read.

A node is a head, a feed-forward block or one of its neurons, a feature of a dictionary, or what its
features miss, at one position. `tl_contextmix.core.linear_graph` makes a graph of them.

Tensors in, tensors out: one sentence, no tokens, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import FeedForward, Trace, require_weight
from tl_contextmix.core.frozen_blocks import (
    FrozenAttention,
    FrozenBlock,
    FrozenFeedForward,
    FrozenStack,
)
from tl_contextmix.core.token_sums import FrozenNorm, beside

Gradient = Float[Tensor, "some pos d_model"]
Places = Int[Tensor, "some 2"]
"""Position and column (head, neuron) of nodes of one sublayer."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention sublayer at every target.

    Attributes:
        frozen: The sublayer.
        mixed: What each head read, before W_O.
    """

    frozen: FrozenAttention
    mixed: Float[Tensor, "target head d_head"]

    @cached_property
    def _reading(self) -> Float[Tensor, "head target source"]:
        """What W_V's output is weighted with: the pattern, over the scale of a norm of values."""
        pattern, scale = self.frozen.pattern[0], self.frozen.reader.value_scale
        return pattern if scale is None else pattern / scale[0, :, :, 0].T[:, None]

    @property
    def constant(self) -> Tensor | None:
        """What the sublayer adds whatever its nodes write."""
        return self.frozen.sublayer.b_O

    def total(self) -> Float[Tensor, "target d_model"]:
        """Returns what all of them write."""
        return torch.einsum("thd,hdm->tm", self.mixed, self._weight("W_O"))

    def mask(self, at: Sequence[tuple[int, int]]) -> Bool[Tensor, "target head"]:
        """Returns which nodes are these."""
        return mask_of(self.mixed[..., 0], at)

    def scores(self, gradient: Float[Tensor, "target d_model"]) -> Float[Tensor, "target head"]:
        """Returns each head's score, given the gradient of the sublayer's output."""
        return (self._through(gradient) * self.mixed).sum(dim=-1)

    def writes(self, at: Places) -> Float[Tensor, "some d_model"]:
        """Returns what some of them write."""
        pos, head = at.T
        return torch.einsum("kd,kdm->km", self.mixed[pos, head], self._weight("W_O")[head])

    def read(
        self, gradient: Float[Tensor, "target d_model"], some: Tensor | None = None
    ) -> tuple[Float[Tensor, "source d_model"], Float[Tensor, ""]]:
        """Returns the gradient of what they read, and what their own biases bring to the score.

        Args:
            gradient: Of the sublayer's output.
            some: Which of them [target head]; None: all.
        """
        through, gate = self._through(gradient), self.frozen.gate
        through = through if gate is None else through * gate[0]
        through = through if some is None else through * some[..., None]
        value = torch.einsum("hts,thd->shd", self._reading, through)
        read = torch.einsum("shd,hmd->sm", value, self._weight("W_V"))
        return self._norm(read[None])[0], (value.sum(dim=0) * self._bias).sum()

    def read_each(
        self, gradient: Float[Tensor, "target d_model"], at: Places
    ) -> tuple[Float[Tensor, "some source d_model"], Float[Tensor, " some"]]:
        """Returns the same of some of them, one by one."""
        pos, head = at.T
        through = torch.einsum("km,kdm->kd", gradient[pos], self._weight("W_O")[head])
        through = through if self.frozen.gate is None else through * self.frozen.gate[0, pos, head]
        read = torch.einsum("kd,kmd->km", through, self._weight("W_V")[head])
        seen = self._reading[head, pos]
        inner = (through * self._bias[head]).sum(dim=-1) * seen.sum(dim=-1)
        return self._norm(seen[:, :, None] * read[:, None]), inner

    def _through(self, gradient: Tensor) -> Float[Tensor, "target head d_head"]:
        return torch.einsum("tm,hdm->thd", gradient, self._weight("W_O"))

    def _norm(self, read: Gradient) -> Gradient:
        # Cross-attention reads its values after the encoder's final norm.
        cross = self.frozen.sublayer.kind == "cross"
        return read if cross else self.frozen.reader.norm_in.pull_back(read)

    @cached_property
    def _bias(self) -> Float[Tensor, "head d_head"]:
        """The values of a stream of zeros."""
        reader = self.frozen.reader
        W_V, norm = self._weight("W_V"), reader.norm_in
        found = W_V.new_zeros(W_V.shape[0], W_V.shape[2])
        if self.frozen.sublayer.kind == "self" and norm.bias is not None:
            found = found + torch.einsum("m,hmd->hd", norm.bias, W_V)
        b_V = reader.sublayer.weights("b_V")
        return found if b_V is None else found + b_V

    def _weight(self, name: str) -> Tensor:
        frozen = self.frozen.reader if name == "W_V" else self.frozen
        return require_weight(frozen.sublayer.weights, name)


@dataclass(frozen=True)
class FeedForwards:
    """The feed-forward block at every position, or its neurons.

    Attributes:
        frozen: The sublayer.
        coefficients: Its activations.
        split: Whether every neuron is a node; else the block is the only column.
    """

    frozen: FrozenFeedForward
    coefficients: Float[Tensor, "pos neuron"]
    split: bool

    @property
    def constant(self) -> Tensor | None:
        """What the sublayer adds whatever its nodes write."""
        return self.sublayer.constant()

    def total(self) -> Float[Tensor, "pos d_model"]:
        """Returns what all of them write."""
        return self.sublayer.write(self.coefficients)

    @cached_property
    def sublayer(self) -> FeedForward:
        """The sublayer, at the positions of the sentence."""
        return self.frozen.sublayer.part(0)

    def mask(self, at: Sequence[tuple[int, int]]) -> Bool[Tensor, "pos column"]:
        """Returns which nodes are these."""
        return mask_of(self.coefficients if self.split else self.coefficients[:, :1], at)

    def scores(self, gradient: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos column"]:
        """Returns each node's score, given the gradient of the sublayer's output."""
        found = self.sublayer.along(gradient) * self.coefficients
        return found if self.split else found.sum(dim=-1, keepdim=True)

    def writes(self, at: Places) -> Float[Tensor, "some d_model"]:
        """Returns what some of them write."""
        pos, column = at.T
        if self.split:
            return self.coefficients[pos, column, None] * self.sublayer.select(column).W_out
        return self.sublayer.part(pos).write(self.coefficients[pos])

    def read(
        self, gradient: Float[Tensor, "pos d_model"], some: Tensor | None = None
    ) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, ""]]:
        """Returns the gradient of what they read, and what their own biases bring to the score."""
        through = self.sublayer.along(gradient)
        through = through if some is None else through * some
        read, inner = self._back(through, slice(None))
        return self.frozen.norm_in.pull_back(read[None])[0], inner.sum()

    def read_each(
        self, gradient: Float[Tensor, "pos d_model"], at: Places
    ) -> tuple[Float[Tensor, "some pos d_model"], Float[Tensor, " some"]]:
        """Returns the same of some of them, one by one."""
        pos, column = at.T
        each = torch.arange(len(at), device=at.device)
        if self.split:
            through = gradient.new_zeros(len(at), self.coefficients.shape[1])
            values = self.sublayer.select(column).W_out
            through[each, column] = (gradient[pos] * values).sum(dim=-1)
        else:
            through = self.sublayer.part(pos).along(gradient[pos])
        read, inner = self._back(through, pos)
        spread = gradient.new_zeros(len(at), *gradient.shape)
        spread[each, pos] = read
        return self.frozen.norm_in.pull_back(spread), inner

    def _back(
        self, through: Float[Tensor, "some neuron"], pos: Tensor | slice
    ) -> tuple[Float[Tensor, "some d_model"], Float[Tensor, " some"]]:
        """Returns the gradient after the norm, and what biases contribute, given the neurons'."""
        ff, slopes = self.sublayer.part(pos), [slope[0, pos] for slope in self.frozen.slopes]
        inner = (through * ff.activate([through.new_zeros(())] * len(slopes))).sum(dim=-1)
        for start, slope in zip(ff.offsets(self.frozen.norm_in.bias), slopes, strict=True):
            inner = inner + (through * slope * start).sum(dim=-1)
        return ff.pull_back(through, slopes), inner


@dataclass(frozen=True)
class Errors:
    """What the features of a dictionary miss at every position: it reads nothing.

    Attributes:
        frozen: The features.
        missing: The vectors.
    """

    frozen: FrozenFeedForward
    missing: Float[Tensor, "pos d_model"]

    @property
    def constant(self) -> None:
        """Nothing."""
        return None

    def total(self) -> Float[Tensor, "pos d_model"]:
        """Returns what all of them write."""
        return self.missing

    def mask(self, at: Sequence[tuple[int, int]]) -> Bool[Tensor, "pos column"]:
        """Returns which nodes are these."""
        return mask_of(self.missing[:, :1], at)

    def scores(self, gradient: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos column"]:
        """Returns each node's score, given the gradient of what it writes."""
        return (gradient * self.missing).sum(dim=-1, keepdim=True)

    def writes(self, at: Places) -> Float[Tensor, "some d_model"]:
        """Returns what some of them write."""
        return self.missing[at[:, 0]]


@dataclass(frozen=True)
class Step:
    """A sublayer of a stack, the features of a dictionary, or their errors.

    Attributes:
        kind: ``"attn"``, ``"cross_attn"``, ``"mlp"``; of a dictionary ``"mlp feature"``, ``"mlp
            error"``, ``"resid_pre feature"`` and so on.
        layer: Its layer.
        nodes: What writes there.
        entry: Whether it reads what enters its block, not what its attention left (parallel).
        first: Whether it is the first sublayer of its block.
        rewrites: Whether what it writes takes the place of the stream.
        entered: What hooks added to the stream in front of it, or None.
        lender: The layer whose input its values are made of, where they are not its own; or None.
    """

    kind: str
    layer: int
    nodes: Heads | FeedForwards | Errors
    entry: bool = False
    first: bool = False
    rewrites: bool = False
    entered: Float[Tensor, "pos d_model"] | None = None
    lender: int | None = None

    @classmethod
    def of(cls, frozen: FrozenBlock, trace: Trace, split: bool) -> list[Step]:
        """Returns those of a block, of the only sentence of a pass."""
        layer, found = frozen.block.layer, []
        for place, attention in enumerate(frozen.attentions):
            kind = "cross_attn" if attention.sublayer.kind == "cross" else "attn"
            nodes = Heads(attention, trace.mixed(attention.sublayer)[0])
            lender = attention.sublayer.lender
            found.append([cls(kind, layer, nodes, first=place == 0, lender=lender)])
        if frozen.feed_forward is not None:
            found.append(_memories(frozen.feed_forward, layer, trace, split, frozen.block.parallel))
        if frozen.rewrite is not None and frozen.block.rewrite is not None:
            features, *error = _memories(frozen.rewrite, layer, trace, True, False)
            place = frozen.block.rewrite.written
            found.insert(place, [replace(features, rewrites=True), *error])
        if frozen.ending is not None:
            found.append(_memories(frozen.ending, layer, trace, False, False))
        return [step for steps in found for step in steps]


def _memories(
    frozen: FrozenFeedForward, layer: int, trace: Trace, split: bool, entry: bool
) -> list[Step]:
    """Returns neurons as a step, or features and their errors as two."""
    ff = frozen.sublayer
    post = ff.coefficients(trace)[0]
    if not ff.missing:
        return [Step(ff.kind, layer, FeedForwards(frozen, post, split), entry)]
    first = replace(frozen, norm_after=FrozenNorm.at(None, trace[ff.missing]))
    return [
        Step(ff.kind, layer, FeedForwards(first, post, True), entry),
        Step(f"{ff.point} error", layer, Errors(frozen, trace[ff.missing][0])),
    ]


@dataclass(frozen=True)
class LinearStack:
    """A stack as a linear map, sublayer by sublayer.

    Attributes:
        name: Its name.
        start: What enters its first block.
        steps: Its sublayers.
        final_norm: Norm of its output, where another stack reads that.
    """

    name: str
    start: Float[Tensor, "pos d_model"]
    steps: tuple[Step, ...]
    final_norm: FrozenNorm

    @classmethod
    def of(cls, name: str, frozen: FrozenStack, trace: Trace, split: bool) -> LinearStack:
        """Returns a frozen stack, of the only sentence of a pass."""
        steps: list[Step] = []
        before = None
        for one in frozen.blocks:
            block, entered = one.block, None
            if trace.edited and before is not None:
                entered = (trace.resid_in(block) - trace[before.resid_out])[0]
            first, *others = Step.of(one, trace, split)
            steps += [replace(first, entered=entered), *others]
            before = block
        start = trace.resid_in(frozen.blocks[0].block)[0]
        return cls(name, start, tuple(steps), frozen.final_norm)


def mask_of(like: Tensor, at: Sequence[tuple[int, int]]) -> Bool[Tensor, "pos column"]:
    """Returns which places of a table are these."""
    result = torch.zeros_like(like, dtype=torch.bool)
    pos, column = beside(like, torch.tensor(at, dtype=torch.long).view(-1, 2)).T
    result[pos, column] = True
    return result
