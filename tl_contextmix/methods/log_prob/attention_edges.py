"""Why a head looks where it does: its score as a sum over pairs of components."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.adapters.verification import relative_error
from tl_contextmix.core.blocks import AttentionSublayer
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.core.residual_stream import (
    AttentionComponent,
    Stop,
    Stream,
    decompose_stream,
    needed,
)
from tl_contextmix.core.score_forms import fit_turns
from tl_contextmix.core.token_sums import FrozenNorm
from tl_contextmix.engine.attention_scores import Edge, Ruler, Side, measure
from tl_contextmix.engine.log_prob_scores import By, split_stream
from tl_contextmix.errors import InvalidInput, UnsupportedModel, seen
from tl_contextmix.results import ScoreContributions
from tl_contextmix.results.components import Components, Grid, join, of_encoder

CUTS = ("layer", "head", "position", "head_position")


def score_contributions(
    view: ModelView,
    given: Given,
    edge: tuple[int, int, int, int],
    *,
    by: By,
    stack: StackName | None,
    max_bytes: int,
) -> ScoreContributions:
    """Returns the score of a head's target and source, by what wrote the streams it reads."""
    if by not in CUTS:
        raise InvalidInput(
            "an attention edge is not cut so finely",
            f"by={by!r}",
            f"one of {list(CUTS)}",
            "Both streams are cut: the result has a number for each pair.",
        )
    layer = _place("layer", edge[0], len(view.blocks(stack)))
    attention = view.blocks(stack)[layer].attention("cross" if stack == "cross" else "self")
    forward_pass = _pass(view, given, stack, layer)
    at = _edge(forward_pass, attention, layer, edge)
    ruler = Ruler(view, forward_pass.batch, attention, at, forward_pass.trace, max_bytes)
    _require_choice(ruler)
    query, key = (
        _read(forward_pass, attention, at, stream, norm, name)
        for (stream, norm), name in zip(_streams(forward_pass, attention, at), "QK", strict=True)
    )
    query, key, normed = _stages(view, attention, query, key)
    measured = measure(ruler, query.side, key.side, (query.shown, key.shown), normed)
    (left, rows), (right, columns) = query.parts(by, at), key.parts(by, at)
    pairs = left @ measured.matrix @ right.T
    _require_sum(view, attention, pairs, measured.position, measured.score)
    side, other = _sides(forward_pass)
    encoder = side != view.base_stack(None)
    return ScoreContributions(
        scores=pairs,
        targets=of_encoder(rows) if encoder else rows,
        sources=of_encoder(columns) if other != view.base_stack(None) else columns,
        position=measured.position,
        score=measured.score,
        weight=float(forward_pass.trace.pattern(attention)[0, at.head, at.target, at.source]),
        soft_cap=attention.soft_cap,
        layer=layer,
        head=at.head,
        target=at.target,
        source=at.source,
        kind="cross_attn" if stack == "cross" else "encoder attn" if encoder else "attn",
        by=by,
        tokens=forward_pass.tokens[side],
        read=forward_pass.tokens[other],
        provenance=forward_pass.provenance(
            "query_contributions", {"edge": [*edge], "by": by, "stack": stack}
        ),
    )


def _sides(forward_pass: Pass) -> tuple[str, str]:
    """Returns the stacks whose streams queries and keys are made of."""
    side = forward_pass.view.base_stack(forward_pass.stack)
    return side, "encoder" if forward_pass.kind == "cross" else side


def _pass(view: ModelView, given: Given, stack: StackName | None, layer: int) -> Pass:
    """Returns the pass over the one sentence, with what both streams need."""
    side = view.base_stack(stack)
    every = [*view.stacks[side][: layer + 1], *(view.stacks["encoder"] if stack == "cross" else ())]
    attention = view.stacks[side][layer].attention("cross" if stack == "cross" else "self")
    names = [name for block in every for name in (*block.points(), *needed(block))]
    names += [attention.query, attention.key, *([attention.scores] if attention.scores else [])]
    forward_pass = run_pass(
        view,
        given,
        layer=range(layer + 1),
        stack=stack,
        also=lambda block: () if block.layer else names,
        needs=frozenset({"pattern", "mixing"}),
    )
    if len(forward_pass.batch.main.ids) != 1:
        raise InvalidInput(
            "an edge is of one text",
            f"{len(forward_pass.batch.main.ids)} texts",
            "one text",
            "Ask about each alone.",
        )
    return forward_pass


def _edge(
    forward_pass: Pass, attention: AttentionSublayer, layer: int, edge: tuple[int, int, int, int]
) -> Edge:
    """Returns the edge, its numbers counted from the start.

    Raises:
        InvalidInput: If there is no such head or position.
    """
    masks = [forward_pass.batch.side(one).mask for one in _sides(forward_pass)]
    head = _place("head", edge[1], len(attention.W_O))
    return Edge(
        layer, head, _position("target", edge[2], masks[0]), _position("source", edge[3], masks[1])
    )


def _require_choice(ruler: Ruler) -> None:
    """Raises InvalidInput where there is no score, or none that can be told."""
    at = ruler.edge
    if not ruler.possible:
        raise InvalidInput(
            "this head cannot look there",
            f"{ruler.attention.pattern}, head {at.head}, from position {at.target} to {at.source}",
            "a source that the target can read",
            "Choose one with an attention weight above 0.",
        )
    if not ruler.shown and ruler.other is None:
        raise InvalidInput(
            "there is nothing to explain",
            f"a target, at position {at.target}, that can read one token only",
            "a head with a choice",
            "Its weight is 1 whatever its score.",
        )


def _place(name: str, given: int, count: int) -> int:
    """Returns a number from the end as one from the start."""
    if not -count <= given < count:
        raise InvalidInput(
            f"there is no such {name}", seen(given), f"0 to {count - 1}", "Choose another."
        )
    return given % count


def _position(name: str, given: int, mask: Tensor) -> int:
    """Returns a position of a sentence; negative ones count from its last token."""
    real = mask[0].nonzero()[:, 0].tolist()
    at = real[given] if -len(real) <= given < 0 else given
    if at not in real:
        raise InvalidInput(
            f"there is no such {name}",
            f"position {given}",
            f"{real[0]} to {real[-1]}, or -{len(real)} to -1",
            "Positions are those of tokens.",
        )
    return at


def _streams(
    forward_pass: Pass, attention: AttentionSublayer, at: Edge
) -> list[tuple[Stream, FrozenNorm]]:
    """Returns the streams that query and key are made of, and the norms that they are read after.

    Cross-attention reads the encoder's, after its final norm.
    """
    view, (side, other) = forward_pass.view, _sides(forward_pass)
    kind = "cross_attn" if forward_pass.kind == "cross" else "attn"
    stop = Stop.before(view.stacks[side][at.layer], kind)
    norms = [attention.norm_in] * 2
    stops: list[Stop | None] = [stop] * 2
    if forward_pass.kind == "cross":
        norms[1], stops[1] = view.final_norms.get("encoder"), None
    result = []
    pairs = zip((side, other), (at.target, at.source), stops, norms, strict=True)
    for stack, pos, stop, norm in pairs:
        stream = decompose_stream(view, forward_pass.trace, stack, torch.tensor([pos]), stop=stop)
        result.append((stream, FrozenNorm.at(norm, stream.total)))
    return result


@dataclass(frozen=True)
class _Read:
    """What a query, or a key, is made of.

    Attributes:
        side: How.
        stream: The stream that is read.
        norm: The norm before.
        raw: What all heads make of it, before a norm of their own.
        shown: What the model shows of all heads.
    """

    side: Side
    stream: Stream
    norm: FrozenNorm
    raw: Float[Tensor, "head d_head"]
    shown: Float[Tensor, "head d_head"]

    def parts(self, by: By, at: Edge) -> tuple[Float[Tensor, "some d_head"], Components]:
        """Returns the part of each component of the stream, biases at last, and their names."""
        vectors, tables = [], []
        for component in self.stream.components:
            cut = by if isinstance(component, AttentionComponent) else "layer"
            for split in split_stream(replace(self.stream, components=(component,)), cut):
                there = split.there[0].nonzero()[:, 0]
                assert split.vectors is not None
                vectors.append(split.vectors()[0][there])
                tables.append(split.grid.at(there[None]))
                if split.bias is not None:
                    vectors.append(split.bias[1][0])
                    tables.append(split.bias[0].table())
        tables.append(Grid("bias", at.layer, self.stream.rows).table())
        every = self.norm.linear(torch.cat(vectors)[None])[0]
        nothing = self.norm.affine(torch.zeros_like(self.stream.total))[0]
        found = [self.side.parts(every, self.raw), self.side.constant(nothing, self.raw)]
        return torch.cat(found), join(tables)


def _read(
    forward_pass: Pass,
    attention: AttentionSublayer,
    at: Edge,
    stream: Stream,
    norm: FrozenNorm,
    name: str,
) -> _Read:
    """Returns what query (``"Q"``) or key (``"K"``) of an edge is made of."""
    hook, pos = (attention.query, at.target) if name == "Q" else (attention.key, at.source)
    shown, x = forward_pass.trace[hook][0, pos], norm.affine(stream.total)[0]
    side = Side.of(attention, name, at.head, len(shown), x)
    return _Read(side, stream, norm, side.raw(x), shown)


def _stages(
    view: ModelView, attention: AttentionSublayer, query: _Read, key: _Read
) -> tuple[_Read, _Read, tuple[bool, bool]]:
    """Returns query and key as hook points show them, and whether that is after their norms.

    Raises:
        UnsupportedModel: If they show something else.
    """
    both = (query, key)
    if attention.divisors is not None:
        turns = fit_turns([(one.raw, one.shown) for one in both], view.tolerance)
        if turns is not None:
            turned = [
                replace(one, side=replace(one.side, turn=turn))
                for one, turn in zip(both, turns, strict=True)
            ]
            return turned[0], turned[1], (True, True)
    found = []
    for one in both:
        shown = ((False, one.raw), (True, one.side.finished(one.raw)))
        found += [a for a, x in shown if relative_error(x, one.shown) <= view.tolerance][:1]
    if len(found) == len(both):
        return query, key, (found[0], found[1])
    raise UnsupportedModel(
        "queries and keys of this head are not read correctly",
        f"{attention.query} or {attention.key}, which are not the stream times W_Q or W_K",
        "linear maps of the normed stream, with or without a norm of their own",
        "Take off hooks that edit queries or keys, if there are any.",
    )


def _require_sum(
    view: ModelView, attention: AttentionSublayer, pairs: Tensor, position: float, score: float
) -> None:
    """Raises UnsupportedModel where pairs do not add up to the model's own score."""
    error = abs(float(pairs.sum()) + position - score)
    error /= max(abs(score), float(pairs.abs().max()), 1e-30)
    if not error <= view.tolerance:
        raise UnsupportedModel(
            "the parts of this score do not add up",
            f"a relative error of {error:.2g}, {attention.pattern}",
            f"at most {view.tolerance:.0e}",
            "Take off hooks of your own that edit queries, keys or scores.",
        )
