r"""Routes of information to a position: what moved each state of the residual stream closest.

A state :math:`y = \sum_j z_j` is a sum of what was there before, of what each head read from each
source and of what the feed-forward block added. The importance of a summand is how close it is,

.. math:: e_j = \frac{\max(0, ||y||_1 - ||z_j - y||_1)}{\sum_k \max(0, ||y||_1 - ||z_k - y||_1)}

(Ferrando & Voita 2024, equations 2 and 3, after ALTI's). Those above a threshold are followed, from
the last state downwards. Norms that stand on the stream itself (post-LN) have frozen scales.

Tensors in, tensors out: one sentence, no tokens, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace, after
from tl_contextmix.core.readout import CACHE_BYTES
from tl_contextmix.core.token_sums import FrozenNorm, beside, blocks


class RouteNode(NamedTuple):
    """A state of the residual stream at a position, or what adds to one.

    Attributes:
        kind: ``"resid_mid"``, ``"resid_mid_cross"``, ``"resid_mid_mlp"`` (in front of a third
            sublayer) or ``"resid_post"`` (states), ``"embed"``, ``"attn"``, ``"cross_attn"``,
            ``"mlp"``, ``"per_layer_embed"`` or ``"answer"``.
        stack: Its stack: 0 writes the answer, 1 is the encoder that it reads.
        layer: Its layer; -1 for embeddings.
        pos: Its position.
        head: Its head; -1 for no head.
    """

    kind: str
    stack: int
    layer: int
    pos: int
    head: int = -1


@dataclass(frozen=True)
class Routes:
    """What is on a route.

    Attributes:
        nodes: Score of each node, the answer first: the largest threshold below which it is on a
            route.
        edges: Importance of what runs from one node (the second) to another.
    """

    nodes: dict[RouteNode, float]
    edges: dict[tuple[RouteNode, RouteNode], float]


@dataclass(frozen=True)
class _State:
    """A state of the stream and what it is a sum of.

    Attributes:
        kind: Its name.
        layer: Its layer.
        before: The stream before.
        value: The state itself.
        norm: The norm of the sum.
        attentions: The attention sublayers that add to it, each with the norm of what it writes.
        feed_forward: What the feed-forward block, or a third sublayer, adds; or None.
        writer: Which of them it is.
    """

    kind: str
    layer: int
    before: Float[Tensor, "target d_model"]
    value: Float[Tensor, "target d_model"]
    norm: FrozenNorm
    attentions: tuple[tuple[AttentionSublayer, FrozenNorm], ...]
    feed_forward: Float[Tensor, "target d_model"] | None
    writer: str = "mlp"

    @classmethod
    def of(
        cls,
        kind: str,
        block: Block,
        before: Float[Tensor, "1 target d_model"],
        some: slice,
        trace: Trace,
    ) -> _State:
        """Returns the state after some sublayers of a block."""
        value, added, attentions, ff = before, 0.0, [], None
        for one in block.sublayers[some]:
            if isinstance(one, AttentionSublayer):
                raw = one.raw_output(trace)
                out = one.output(trace, raw=raw)
                attentions.append((one, FrozenNorm.at(one.norm_out, raw)))
            else:
                out = one.output(trace)
            if isinstance(one, FeedForward):
                ff = one, out[0]
            value, added = after(value, one, out, trace), added + out
        return cls(
            kind=kind,
            layer=block.layer,
            before=before[0],
            value=value[0],
            norm=FrozenNorm.at(block.sublayers[some][-1].norm_after, before + added),
            attentions=tuple(attentions),
            feed_forward=None if ff is None else ff[1],
            writer="mlp" if ff is None else ff[0].kind,
        )


def _states(block: Block, trace: Trace) -> list[_State]:
    """Returns the states of the stream in a block, from below; of a parallel block the last."""
    stream = trace.resid_in(block)
    if block.parallel:
        return [_State.of("resid_post", block, stream, slice(0, len(block.sublayers)), trace)]
    result: list[_State] = []
    for place, one in enumerate(block.sublayers):
        last = one is block.sublayers[-1]
        cross = isinstance(one, AttentionSublayer) and one.kind == "cross"
        before = "resid_mid_mlp" if one is block.feed_forward else "resid_mid"
        kind = "resid_post" if last else "resid_mid_cross" if cross else before
        result.append(_State.of(kind, block, stream, slice(place, place + 1), trace))
        stream = result[-1].value[None]
    return result


def importance(
    parts: Float[Tensor, "*some d_model"], whole: Float[Tensor, "*whole d_model"]
) -> Float[Tensor, "*some"]:
    """Returns how much closer to the whole each part is than nothing: not yet normalised."""
    return (whole.abs().sum(dim=-1) - (parts - whole).abs().sum(dim=-1)).clamp(min=0)


def find_routes(
    stacks: Sequence[tuple[Block, ...]], trace: Trace, pos: int, threshold: float, max_bytes: int
) -> Routes:
    """Returns the routes to the last state at a position.

    Args:
        stacks: The stack that writes the answer, and the encoder that it reads.
        trace: The pass.
        pos: The position.
        threshold: Only what is more important is followed.
        max_bytes: Workspace: what one head reads at one position is held at least.
    """
    search = _Search(stacks, trace, threshold, max_bytes)
    search.reach(RouteNode("answer", 0, stacks[0][-1].layer, pos), 1.0)
    for index, stack in enumerate(stacks):
        for some in _together(stack, trace, max_bytes):
            search.expand(index, some)
    return Routes(search.nodes, search.edges)


def _together(
    stack: tuple[Block, ...], trace: Trace, max_bytes: int
) -> Iterator[tuple[Block, ...]]:
    """Yields the blocks of a stack that are read at once, from the last ones downwards.

    On a CPU each alone, as a block is read only where it was reached from above. A GPU would be
    waited for each time: as many as fit are read at all positions.
    """
    stream = trace.resid_in(stack[0])
    shares = max(sum(trace.mixing(one).nbytes for one in block.attentions) for block in stack)
    fit = max_bytes // (2 * shares + 4 * stream.nbytes)
    for some in blocks(len(stack), 1 if stream.device.type == "cpu" else fit):
        yield stack[::-1][some]


def _entering(index: int, layer: int) -> RouteNode:
    """Returns the state that enters a layer, at any position."""
    return RouteNode("resid_post" if layer else "embed", index, layer - 1, 0)


class _Search:
    """What was reached so far, from above."""

    def __init__(
        self, stacks: Sequence[tuple[Block, ...]], trace: Trace, threshold: float, max_bytes: int
    ) -> None:
        self.nodes: dict[RouteNode, float] = {}
        self.edges: dict[tuple[RouteNode, RouteNode], float] = {}
        self._reached: dict[tuple[str, int, int], list[RouteNode]] = {}
        self._stacks, self._trace = stacks, trace
        self._threshold, self._max_bytes = threshold, max_bytes

    def reach(self, node: RouteNode, score: float) -> None:
        """Takes up a node, or a better route to it."""
        if node not in self.nodes:
            kind = "resid_post" if node.kind == "answer" else node.kind
            self._reached.setdefault((kind, node.stack, node.layer), []).append(node)
        self.nodes[node] = max(self.nodes.get(node, 0.0), score)

    def expand(self, index: int, some: tuple[Block, ...]) -> None:
        """Follows what is important in some blocks, from the first one downwards.

        One copy to the host serves all. Of a block alone only those positions are read at which its
        last state was reached: from there the others are, too.
        """
        every = [_states(block, self._trace) for block in some]
        last = every[0][-1]
        rows = [*range(len(last.value))]
        if len(some) == 1:
            rows = [node.pos for node in self._reached.get((last.kind, index, last.layer), [])]
            if not rows:
                return
        at = beside(last.value, rows)
        shares = [self._shares(state, at) for states in every for state in reversed(states)]
        listed = iter(torch.cat(shares, dim=1).cpu().split([one.shape[1] for one in shares], dim=1))
        for states in every:
            for place in reversed(range(len(states))):
                found = dict(zip(rows, next(listed), strict=True))
                self._follow_parts(index, states, place, found)

    def _shares(self, state: _State, rows: Int[Tensor, " target"]) -> Float[Tensor, "target part"]:
        """Returns the importance of the parts of a state at some positions.

        They are the stream before, what the feed-forward block adds, if any, and of each attention
        its heads and their sources.
        """
        whole, scale = state.value[rows], state.norm.scale[0, rows]

        def alone(parts: Tensor) -> Tensor:
            return importance(state.norm.unscaled(parts[rows]) / scale, whole)[:, None]

        alones = [state.before, *([] if state.feed_forward is None else [state.feed_forward])]
        heads = [self._heads(state, each, rows).flatten(1) for each in state.attentions]
        found = torch.cat([*map(alone, alones), *heads], dim=1)
        # Where nothing goes its way nothing is followed.
        return found / found.sum(dim=1, keepdim=True).clamp(min=1e-30)

    def _follow_parts(
        self, index: int, states: Sequence[_State], place: int, shares: dict[int, Tensor]
    ) -> None:
        """Follows the important parts of a state where it was reached, by position."""
        state, below = states[place], self._below(index, states, place)
        targets = self._reached.get((state.kind, index, state.layer), [])
        for target in targets:
            read = below._replace(pos=target.pos)
            self._follow(target, read, float(shares[target.pos][0]))
            if state.feed_forward is not None:
                self._through(target, state.writer, -1, read, float(shares[target.pos][1]))
        first = 1 if state.feed_forward is None else 2
        for one, _ in state.attentions:
            heads, _, sources = self._trace.mixing(one)[0].shape
            cross = one.kind == "cross"
            source = RouteNode("resid_post", 1, self._stacks[1][-1].layer, 0) if cross else below
            source = source if one.lender is None else _entering(index, one.lender)
            for target in targets:
                found = shares[target.pos][first : first + heads * sources].view(heads, sources)
                for head, pos in (found > self._threshold).nonzero().tolist():
                    read, share = source._replace(pos=pos), float(found[head, pos])
                    self._through(target, "cross_attn" if cross else "attn", head, read, share)
            first += heads * sources

    def _below(self, index: int, states: Sequence[_State], place: int) -> RouteNode:
        """Returns the state before one, at any position."""
        layer = states[place].layer
        if place:
            return RouteNode(states[place - 1].kind, index, layer, 0)
        return _entering(index, layer)

    def _through(
        self, target: RouteNode, kind: str, head: int, source: RouteNode, share: float
    ) -> None:
        """Follows a head or a feed-forward block to what it reads."""
        by = RouteNode(kind, target.stack, target.layer, target.pos, head)
        self._follow(target, by, share)
        self._follow(by, source, share)

    def _follow(self, target: RouteNode, source: RouteNode, share: float) -> None:
        if share > self._threshold:
            self.reach(source, min(self.nodes[target], share))
            self.edges[target, source] = self.edges.get((target, source), 0.0) + share

    def _heads(
        self, state: _State, one: tuple[AttentionSublayer, FrozenNorm], rows: Int[Tensor, " target"]
    ) -> Float[Tensor, "target head source"]:
        """Returns the importance of what each head reads from each source."""
        sublayer, norm = one
        pattern = self._trace.mixing(sublayer)[0][:, rows]
        value, gate = self._trace.value(sublayer)[0], self._trace.gate(sublayer)
        scale = norm.scale[0, rows] * state.norm.scale[0, rows]
        found = torch.zeros_like(pattern)
        room = self._max_bytes
        if value.device.type == "cpu":
            room = min(room, CACHE_BYTES)
        vector = value.shape[0] * state.value.shape[1] * value.element_size()
        pairs = room // (4 * vector)

        def written(some: slice, targets: slice) -> Float[Tensor, "head target source d_model"]:
            read = value[None, :, some]
            read = read if gate is None else read * gate[0, rows[targets], None, some]
            vectors = torch.einsum("tshd,hdm->htsm", read, sublayer.W_O[some])
            return state.norm.unscaled(norm.unscaled(vectors))

        for some in blocks(len(found), pairs):
            # Without a gate they are the same at every target.
            shared = written(some, slice(0)) if gate is None else None
            for part in blocks(len(rows), pairs // len(pattern[some])):
                vectors = written(some, part) if shared is None else shared
                parts = vectors * (pattern[some, part] / scale[part])[..., None]
                found[some, part] = importance(parts, state.value[rows[part]][:, None])
        return found.transpose(0, 1)
