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
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.linear_steps import Errors, FeedForwards, Gradient, LinearStack, mask_of
from tl_contextmix.core.token_sums import beside, blocks, listed


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
            mask = None if at is None else step.nodes.mask(at.get((index, place), [])) != without
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
                mask = mask_of(entered, at.get((index, step), [])) != without
                total += entered.where(mask, 0).sum()
        return float(total + sum(pulled.biases.values()))

    def scores(self, pulled: Pulled, index: int, step: int) -> Float[Tensor, "pos column"]:
        """Returns the scores of a sublayer's nodes, or (step -1) of what enters a stack."""
        gradient, stack = pulled.gradients[index, step], self.stacks[index]
        if step < 0:
            return (gradient * stack.start).sum(dim=-1, keepdim=True)
        return stack.steps[step].nodes.scores(gradient)

    def best(self, pulled: Pulled, most: int) -> list[Place]:
        """Returns the nodes of largest absolute score, largest first; of shapes alone any."""
        if self.slope.is_meta:
            shapes = ((at, self.scores(pulled, *at).shape) for at in pulled.gradients)
            every = (
                Place(*at, p, c)
                for at, (pos, own) in shapes
                for c in range(own)
                for p in range(pos)
            )
            return [*islice(every, most)]
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
        for (index, step), some in _by_step(kept).items():
            stack = self.stacks[index]
            at = beside(stack.start, some)
            pos = at[:, 0]
            if step < 0:
                vectors = stack.start[pos]
            else:
                nodes = stack.steps[step].nodes
                norm = nodes.frozen.norm_out
                vectors = norm.unscaled(nodes.writes(at)) / norm.scale[0, pos]
            places = (Place(index, step, *one) for one in some)
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
        rows = beside(edges, readers)
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
            ids, at = (beside(gradient, some) for some in table.of_step(index, step))
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
            mine = [(row_of[id], place) for id, place in zip(ids, at, strict=True) if id in row_of]
            rest = row_of.get(table.ids.get(Node("rest", index, step.layer), -1))
            if not mine and rest is None:
                return 0.0
            inner = self.slope.new_zeros(len(readers))
            source = self.stacks[1] if step.kind == "cross_attn" else self.stacks[index]
            read = self.slope.new_zeros(len(readers), *source.start.shape)
            whole = pulled.gradients[index, place]
            if mine:
                own, places = (beside(whole, some) for some in zip(*mine, strict=True))
                read[own], inner[own] = step.nodes.read_each(whole, places)
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
                    at = some.get((index, step), [])
                    for pos, column in at:
                        node = Node("node", index, layer, Place(index, step, pos, column))
                        scores[node] = found[pos, column].clone()
                    found = found.where(~mask_of(found, at), 0)
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

    def of_step(self, index: int, step: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the nodes of a sublayer that are kept, and where they are."""
        mine = {
            id: (node.place.pos, node.place.column)
            for id, node in enumerate(self.nodes)
            if node.place is not None and node.place[:2] == (index, step)
        }
        return [*mine], [*mine.values()]


def _by_step(kept: Sequence[Place]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Returns positions and columns of nodes by stack and sublayer, in order."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place in sorted(kept):
        found.setdefault((place.stack, place.step), []).append((place.pos, place.column))
    return found


def _along(gradient: Gradient, vector: Tensor | None) -> Float[Tensor, " some"]:
    """Returns what a vector, the same everywhere or one for each position, brings to scores."""
    if vector is None:
        return gradient.new_zeros(len(gradient))
    return torch.einsum("kpm,pm->k", gradient, vector.expand(gradient.shape[1:]))
