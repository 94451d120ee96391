r"""A model as a graph of what writes to its residual stream and what reads it.

With patterns, norm scales and secant slopes frozen, a score that is linear in the last state is
linear in everything that was written before. For a node :math:`m` that writes :math:`w_m`,

.. math:: S(m) = \langle g_m, w_m \rangle = \sum_n \langle r_m, w_n \rangle + \beta_m,
          \qquad g_m = \sum_{k} r_k

with :math:`g_m` the score's gradient where :math:`m` writes, :math:`r_m` the part of it that runs
through what :math:`m` reads, and :math:`\beta_m` what the biases inside of :math:`m` bring.
:math:`\langle r_m, w_n \rangle` is the edge from :math:`n` to :math:`m`: those into a node and
those out of it add up to its score. Norms that stand on the stream itself (post-LN) are passed on
the way.

Tensors in, tensors out: one sentence, no tokens, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

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
from tl_contextmix.core.token_sums import FrozenNorm, blocks

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

    @property
    def pattern(self) -> Float[Tensor, "head target source"]:
        """Frozen attention probabilities."""
        return self.frozen.pattern[0]

    @cached_property
    def _reading(self) -> Float[Tensor, "head target source"]:
        """What W_V's output is weighted with: the pattern, over the scale of a norm of values."""
        scale = self.frozen.reader.value_scale
        return self.pattern if scale is None else self.pattern / scale[0, :, :, 0].T[:, None]

    @property
    def constant(self) -> Tensor | None:
        """What the sublayer adds whatever its nodes write."""
        return self.frozen.sublayer.b_O

    def total(self) -> Float[Tensor, "target d_model"]:
        """Returns what all of them write."""
        return torch.einsum("thd,hdm->tm", self.mixed, self._weight("W_O"))

    def mask(self, at: Places | None) -> Bool[Tensor, "target head"]:
        """Returns which nodes are these."""
        return _mask(self.mixed[..., 0], at)

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

    def mask(self, at: Places | None) -> Bool[Tensor, "pos column"]:
        """Returns which nodes are these."""
        return _mask(self.coefficients if self.split else self.coefficients[:, :1], at)

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

    def mask(self, at: Places | None) -> Bool[Tensor, "pos column"]:
        """Returns which nodes are these."""
        return _mask(self.missing[:, :1], at)

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


class Place(NamedTuple):
    """A node: its stack, its sublayer there (-1: what enters), position and column."""

    stack: int
    step: int
    pos: int
    column: int


class Node(NamedTuple):
    """What a graph has a score for.

    Attributes:
        kind: ``"node"``, ``"bias"``, ``"rest"`` (what was pruned), ``"error rest"`` (those of the
            errors of dictionaries, which read nothing) or ``"answer"``.
        stack: Its stack; for the readout's bias and the answer that of the answer.
        layer: Its layer; -1 for what enters the stack, `READOUT` after the last one.
        place: Which node; None for what gathers several.
    """

    kind: str
    stack: int
    layer: int
    place: Place | None = None


READOUT = 2**20


@dataclass(frozen=True)
class Graph:
    """Nodes and the edges between them.

    Attributes:
        nodes: The nodes, each after those that it reads; the answer is last.
        scores: Each node's total effect on the score.
        edges: What runs directly from one node to another.
    """

    nodes: tuple[Node, ...]
    scores: Float[Tensor, " node"]
    edges: Float[Tensor, "target source"]


@dataclass(frozen=True)
class Pulled:
    """What one linearised backward pass finds.

    Attributes:
        gradients: Of what every sublayer writes (step -1: of what enters), by stack and step.
        biases: What biases bring to the score, by stack and layer.
    """

    gradients: dict[tuple[int, int], Float[Tensor, "pos d_model"]]
    biases: dict[tuple[int, int], Float[Tensor, ""]]


# Cross-attention reads another stack, of another length.
Read = Float[Tensor, "some source d_model"]
Visit = Callable[[int, int, Gradient], Read | float]


@dataclass(frozen=True)
class LinearGraph:
    """A score as a linear function of all that the sublayers write.

    Attributes:
        stacks: The stack that writes the answer, and the encoder that it reads.
        slope: Gradient of the score in the last state.
        constant: What the readout's own biases bring.
        score: The score.
    """

    stacks: tuple[LinearStack, ...]
    slope: Float[Tensor, "pos d_model"]
    constant: float
    score: float

    @property
    def split(self) -> bool:
        """Whether neurons are nodes."""
        every = (step.nodes for stack in self.stacks for step in stack.steps)
        return any(isinstance(nodes, FeedForwards) and nodes.split for nodes in every)

    def pull(self, some: Sequence[Place] | None = None, *, without: bool = False) -> Pulled:
        """Returns the gradients of everything that is written.

        Args:
            some: Nodes that alone pass anything on; None: all.
            without: Whether all but these do.
        """
        at = None if some is None else _by_step(some)
        result = Pulled({}, {})

        def bias(index: int, layer: int, brought: Tensor) -> None:
            result.biases[index, layer] = result.biases.get((index, layer), 0) + brought.sum()

        def visit(index: int, place: int, gradient: Gradient) -> Read:
            step = self.stacks[index].steps[place]
            result.gradients[index, place] = gradient[0]
            if isinstance(step.nodes, Errors):
                return torch.zeros_like(gradient)
            mask = None if at is None else step.nodes.mask(at.get((index, place))) != without
            read, inner = step.nodes.read(gradient[0], mask)
            bias(index, step.layer, inner)
            return read[None]

        def end(index: int, gradient: Gradient) -> None:
            result.gradients[index, -1] = gradient[0]

        self._descend(self.slope[None], visit, bias, end)
        return result

    def passed_on(self, some: Sequence[Place], *, without: bool = False) -> float:
        """Returns the part of the score that runs through these nodes, and biases, alone.

        Args:
            some: The nodes.
            without: Whether they are those that are ablated: it runs through all the others.
        """
        pulled, total, at = self.pull(some, without=without), self.constant, _by_step(some)
        for index, stack in enumerate(self.stacks):
            errors = (i for i, step in enumerate(stack.steps) if isinstance(step.nodes, Errors))
            for step in (-1, *errors):
                entered = self.scores(pulled, index, step)
                mask = _mask(entered, at.get((index, step))) != without
                total += float(entered[mask].sum())
        return total + float(sum(pulled.biases.values()))

    def scores(self, pulled: Pulled, index: int, step: int) -> Float[Tensor, "pos column"]:
        """Returns the scores of a sublayer's nodes, or (step -1) of what enters a stack."""
        gradient, stack = pulled.gradients[index, step], self.stacks[index]
        if step < 0:
            return (gradient * stack.start).sum(dim=-1, keepdim=True)
        return stack.steps[step].nodes.scores(gradient)

    def best(self, pulled: Pulled, most: int) -> list[Place]:
        """Returns the nodes of largest absolute score, largest first."""
        sizes, tops = [], []
        for at in pulled.gradients:
            sizes.append(self.scores(pulled, *at).abs())
            tops.append(sizes[-1].flatten().topk(min(most, sizes[-1].numel())))
        found: list[tuple[float, Place]] = []
        each = zip(
            pulled.gradients,
            sizes,
            listed([top.values for top in tops]),
            listed([top.indices for top in tops]),
            strict=True,
        )
        for (index, step), size, values, places in each:
            for value, at in zip(values, places, strict=True):
                found.append((value, Place(index, step, *divmod(int(at), size.shape[1]))))
        order = sorted(found, key=lambda one: (-one[0], one[1]))
        return [place for size, place in order[:most] if size]

    def possible(self, pulled: Pulled) -> int:
        """Returns how many nodes have a score other than zero."""
        counts = [(self.scores(pulled, *at) != 0).sum() for at in pulled.gradients]
        return int(torch.stack([count.to(counts[0].device) for count in counts]).sum())

    def writes(self, kept: Sequence[Place]) -> Float[Tensor, "some d_model"]:
        """Returns what some nodes write to the stream, in their order."""
        found: dict[Place, Tensor] = {}
        for (index, step), at in _by_step(kept).items():
            stack, pos = self.stacks[index], at[:, 0]
            if step < 0:
                vectors = stack.start[pos]
            else:
                nodes = stack.steps[step].nodes
                norm = nodes.frozen.norm_out
                vectors = norm.unscaled(nodes.writes(at)) / norm.scale[0, pos]
            places = (Place(index, step, *one) for one in at.tolist())
            found |= dict(zip(places, vectors, strict=True))
        return torch.stack([found[place] for place in kept])

    def graph(self, pulled: Pulled, kept: Sequence[Place], max_bytes: int) -> Graph:
        """Returns the graph of some nodes, biases and what is left of every layer.

        The rest of a layer is the flow that enters it from elsewhere and leaves it again.

        Args:
            pulled: What `pull` found of all nodes.
            kept: The nodes.
            max_bytes: Workspace: so many nodes are carried down at a time, at least one.
        """
        table = _Table.of(self, pulled, kept)
        edges = self.slope.new_zeros(len(table.nodes), len(table.nodes))
        width = sum(stack.start.numel() for stack in self.stacks) * edges.element_size()
        readers = [id for id, node in enumerate(table.nodes) if self.reads(node)]
        for part in blocks(len(readers), max_bytes // (6 * width)):
            self._read_by(table, pulled, readers[part], edges)
        answer, readout = len(table.nodes) - 1, len(table.nodes) - 2
        edges[answer, readout] = self.constant
        # Between nodes that were pruned together: no edge of what is shown.
        scores = table.scores - edges.diagonal()
        edges.fill_diagonal_(0)
        shown = (edges != 0).any(dim=0) | (edges != 0).any(dim=1)
        shown[answer] = True
        nodes = tuple(
            node for node, there in zip(table.nodes, shown.tolist(), strict=True) if there
        )
        return Graph(nodes, scores[shown], edges[shown][:, shown])

    def reads(self, node: Node) -> bool:
        """Whether a node reads the stream, so that edges into it add up to its score."""
        if node.layer < 0 or node.kind in ("bias", "error rest"):
            return False
        place = node.place
        if place is None:
            return True
        return not isinstance(self.stacks[place.stack].steps[place.step].nodes, Errors)

    def _read_by(self, table: _Table, pulled: Pulled, readers: list[int], edges: Tensor) -> None:
        """Writes the edges into some nodes."""
        rows = torch.tensor(readers)
        row_of = {id: row for row, id in enumerate(readers)}
        gradient = self.slope.new_zeros(len(readers), *self.slope.shape)
        answer = len(table.nodes) - 1
        if answer in row_of:
            gradient[row_of[answer]] = self.slope

        def bias(index: int, layer: int, brought: Tensor) -> None:
            source = table.ids.get(Node("bias", index, layer))
            if source is not None:
                edges[rows, source] += brought

        def written(index: int, step: int, layer: int, gradient: Gradient) -> None:
            """Takes the edges from what a sublayer writes, or from what enters a stack."""
            stack = self.stacks[index]
            nodes = None if step < 0 else stack.steps[step].nodes
            rest = _along(gradient, stack.start if nodes is None else nodes.total())
            ids, at = table.of_step(index, step)
            for part in blocks(len(ids), max(1, gradient.shape[1])):
                pos = at[part, 0]
                vectors = stack.start[pos] if nodes is None else nodes.writes(at[part])
                found = torch.einsum("kmd,md->km", gradient[:, pos], vectors)
                edges[rows[:, None], ids[part]] += found
                rest = rest - found.sum(dim=1)
            kind = "error rest" if isinstance(nodes, Errors) else "rest"
            source = table.ids.get(Node(kind, index, layer))
            if source is not None:
                edges[rows, source] += rest

        def visit(index: int, place: int, gradient: Gradient) -> Read | float:
            step = self.stacks[index].steps[place]
            written(index, place, step.layer, gradient)
            if isinstance(step.nodes, Errors):
                return 0.0
            ids, at = table.of_step(index, place)
            mine = [i for i, id in enumerate(ids.tolist()) if id in row_of]
            rest = row_of.get(table.ids.get(Node("rest", index, step.layer), -1))
            if not mine and rest is None:
                return 0.0
            inner = self.slope.new_zeros(len(readers))
            source = self.stacks[1] if step.kind == "cross_attn" else self.stacks[index]
            read = self.slope.new_zeros(len(readers), *source.start.shape)
            whole = pulled.gradients[index, place]
            if mine:
                own = [row_of[id] for id in ids[mine].tolist()]
                read[own], inner[own] = step.nodes.read_each(whole, at[mine])
            if rest is not None:
                read[rest], inner[rest] = step.nodes.read(whole, ~step.nodes.mask(at))
            bias(index, step.layer, inner)
            return read

        def end(index: int, gradient: Gradient) -> None:
            written(index, -1, -1, gradient)

        self._descend(gradient, visit, bias, end)

    def _descend(
        self,
        gradient: Gradient,
        visit: Visit,
        bias: Callable[[int, int, Tensor], None],
        end: Callable[[int, Gradient], None],
    ) -> None:
        """Carries gradients down all stacks.

        Args:
            gradient: At the last state.
            visit: Takes a sublayer and the gradient of its output; returns that of what it reads.
            bias: Takes a layer and what its biases bring to each.
            end: Takes the gradient of what enters a stack.
        """
        memory = gradient
        for index, stack in enumerate(self.stacks):
            if index:
                bias(index, stack.steps[-1].layer, _along(memory, stack.final_norm.bias))
                gradient = stack.final_norm.pull_back(memory)
            if index + 1 < len(self.stacks):
                memory = gradient.new_zeros(len(gradient), *self.stacks[index + 1].start.shape)
            entry: Gradient | float = 0.0
            lent: dict[int, Gradient | float] = {}
            for place in reversed(range(len(stack.steps))):
                step = stack.steps[place]
                frozen = step.nodes.frozen
                bias(index, step.layer, _along(gradient, frozen.norm_after.bias))
                gradient = frozen.norm_after.pull_back(gradient)
                bias(index, step.layer, _along(gradient, frozen.norm_out.bias))
                raw = frozen.norm_out.pull_back(gradient)
                bias(index, step.layer, _along(raw, step.nodes.constant))
                read = visit(index, place, raw)
                if step.kind == "cross_attn":
                    memory = memory + read
                elif step.entry:
                    entry = entry + read
                elif step.lender is not None:
                    lent[step.lender] = read + lent.get(step.lender, 0.0)
                elif step.rewrites:
                    gradient = torch.zeros_like(gradient) + read
                else:
                    gradient = gradient + read
                if step.first:
                    gradient, entry = gradient + entry + lent.pop(step.layer, 0.0), 0.0
                bias(index, step.layer, _along(gradient, step.entered))
            end(index, gradient)


@dataclass(frozen=True)
class _Table:
    """All nodes of a graph, with their scores.

    Attributes:
        nodes: The nodes, in order.
        scores: Their scores; of what is left of a layer those of all that was pruned.
        ids: Place of each node.
    """

    nodes: tuple[Node, ...]
    scores: Float[Tensor, " node"]
    ids: dict[Node, int]

    @classmethod
    def of(cls, graph: LinearGraph, pulled: Pulled, kept: Sequence[Place]) -> _Table:
        """Returns the nodes of a graph that keeps some."""
        scores: dict[Node, Tensor] = {}
        left: dict[Node, Tensor] = {}
        some = _by_step(kept)
        for index in reversed(range(len(graph.stacks))):
            layers = [-1, *(step.layer for step in graph.stacks[index].steps)]
            for layer in dict.fromkeys(layers):
                rest: dict[Node, Tensor] = {}
                for step in (place - 1 for place, its in enumerate(layers) if its == layer):
                    found = graph.scores(pulled, index, step)
                    at = some.get((index, step), _NOWHERE)
                    for pos, column in at.tolist():
                        node = Node("node", index, layer, Place(index, step, pos, column))
                        scores[node] = found[pos, column].clone()
                    found[at[:, 0], at[:, 1]] = 0
                    errors = step >= 0 and isinstance(graph.stacks[index].steps[step].nodes, Errors)
                    node = Node("error rest" if errors else "rest", index, layer)
                    rest[node] = found.sum() + rest.get(node, 0)
                    left[node] = (found != 0).any() | left.get(node, False)
                if layer >= 0:
                    scores[Node("bias", index, layer)] = pulled.biases[index, layer]
                scores |= rest
        scores[Node("bias", 0, READOUT)] = graph.slope.new_tensor(graph.constant)
        scores[Node("answer", 0, READOUT)] = graph.slope.new_tensor(graph.score)
        # Rests of nothing are no nodes.
        for node, some_left in zip(left, listed([torch.stack([*left.values()])])[0], strict=True):
            if not some_left:
                del scores[node]
        nodes = tuple(scores)
        ids = {node: place for place, node in enumerate(nodes)}
        return cls(nodes, torch.stack([*scores.values()]), ids)

    def of_step(self, index: int, step: int) -> tuple[Int[Tensor, " some"], Places]:
        """Returns the nodes of a sublayer that are kept, and where they are."""
        mine = [
            (id, node.place.pos, node.place.column)
            for id, node in enumerate(self.nodes)
            if node.place is not None and node.place[:2] == (index, step)
        ]
        table = torch.tensor(mine, dtype=torch.long).view(-1, 3)
        return table[:, 0], table[:, 1:]


_NOWHERE = torch.zeros(0, 2, dtype=torch.long)


def listed(vectors: Sequence[Tensor]) -> list[list[Any]]:
    """Returns the numbers of some vectors, whole or not, copied to the host at once."""
    if not vectors:
        return []
    whole = torch.cat([vector.to(vectors[0].device) for vector in vectors])
    return [part.tolist() for part in whole.cpu().split([len(vector) for vector in vectors])]


def _by_step(kept: Sequence[Place]) -> dict[tuple[int, int], Places]:
    """Returns positions and columns of nodes by stack and sublayer, in order."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place in sorted(kept):
        found.setdefault((place.stack, place.step), []).append((place.pos, place.column))
    return {key: torch.tensor(some) for key, some in found.items()}


def _mask(like: Tensor, at: Places | None) -> Bool[Tensor, "pos column"]:
    """Returns which places of a table are these."""
    result = torch.zeros_like(like, dtype=torch.bool)
    if at is not None:
        result[at[:, 0], at[:, 1]] = True
    return result


def _along(gradient: Gradient, vector: Tensor | None) -> Float[Tensor, " some"]:
    """Returns what a vector, the same everywhere or one for each position, brings to scores."""
    if vector is None:
        return gradient.new_zeros(len(gradient))
    return torch.einsum("kpm,pm->k", gradient, vector.expand(gradient.shape[1:]))
