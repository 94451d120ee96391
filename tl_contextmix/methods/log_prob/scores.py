"""Why a head looks where it does: its score as a sum over pairs of components."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs import Given, Pass, run_pass
from tl_contextmix.core.blocks import AttentionSublayer
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.core.residual_stream import (
    AttentionComponent,
    Stop,
    Stream,
    decompose_stream,
    needed,
)
from tl_contextmix.core.token_sums import FrozenNorm
from tl_contextmix.engine.attention_scores import Edge, Ruler, Side, measure
from tl_contextmix.engine.log_prob_scores import By, split_stream
from tl_contextmix.errors import UnsupportedModel, bad, four_parts, seen
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
        raise bad(
            "an attention edge is not cut so finely",
            f"by={by!r}",
            f"one of {list(CUTS)}",
            "Both streams are cut: the result has a number for each pair.",
        )
    layers = len(view.blocks(stack))
    layer = _place("layer", edge[0], layers)
    block = view.blocks(stack)[layer]
    kind = "cross" if stack == "cross" else "self"
    attention = block.attention(kind)
    head = _place("head", edge[1], len(attention.W_O))
    done, side = _pass(view, given, stack, layer), view.base_stack(stack)
    other = "encoder" if kind == "cross" else side
    at = Edge(
        layer,
        head,
        _position("target", edge[2], done.batch.side(side).mask),
        _position("source", edge[3], done.batch.side(other).mask),
    )
    trace = done.trace
    weight = float(trace.pattern(attention)[0, head, at.target, at.source])
    if not weight > 0:
        raise bad(
            "this head cannot look there",
            f"{attention.pattern}, head {head}, from position {at.target} to {at.source}",
            "a source that the target can read",
            "Choose one with an attention weight above 0.",
        )
    pos = torch.tensor([at.target]), torch.tensor([at.source])
    own = decompose_stream(
        view, trace, side, pos[0], stop=Stop.before(block, "cross_attn" if kind == "cross" else "attn")
    )
    read = own
    if kind == "cross":
        read = decompose_stream(view, trace, "encoder", pos[1])
    elif at.source != at.target:
        read = decompose_stream(view, trace, side, pos[1], stop=Stop.before(block, "attn"))
    norms = attention.norm_in, view.final_norms.get("encoder") if kind == "cross" else attention.norm_in
    hooked = trace[attention.query][0, at.target], trace[attention.key][0, at.source]
    sides, parts, raws, labels, normed = [], [], [], [], []
    for name, stream, norm, shown in zip("QK", (own, read), norms, hooked, strict=True):
        one = Side.of(attention, name, head, len(shown))
        frozen = FrozenNorm.at(norm, stream.total)
        raw = one.raw(frozen.affine(stream.total)[0])
        vectors, table = _components(stream, by, layer)
        found = one.parts(frozen.linear(vectors[None])[0], raw)
        nothing = frozen.affine(torch.zeros_like(stream.total))[0]
        parts.append(torch.cat([found, one.constant(nothing, raw)]))
        side_of = other if name == "K" else side
        labels.append(of_encoder(table) if side_of != view.base_stack(None) else table)
        normed.append(_is_normed(view, attention, one, raw, shown))
        sides.append(one)
    ruler = Ruler(view, done.batch, attention, at, trace, max_bytes)
    if not ruler.shown and ruler.other is None:
        raise bad(
            "there is nothing to explain",
            f"a target, at position {at.target}, that can read one token only",
            "a head with a choice",
            "Its weight is 1 whatever its score.",
        )
    measured = measure(ruler, *sides, hooked, tuple(normed))
    pairs = parts[0] @ measured.matrix @ parts[1].T
    _require_sum(view, attention, float(pairs.sum()) + measured.position, measured.score, pairs)
    return ScoreContributions(
        scores=pairs,
        targets=labels[0],
        sources=labels[1],
        position=measured.position,
        score=measured.score,
        weight=weight,
        soft_cap=attention.soft_cap,
        layer=layer,
        head=head,
        target=at.target,
        source=at.source,
        kind=("encoder " if side != view.base_stack(None) else "")
        + ("cross_attn" if kind == "cross" else "attn"),
        by=by,
        tokens=done.tokens[side],
        read=done.tokens[other],
        provenance=done.provenance(
            "query_contributions", {"edge": [*edge], "by": by, "stack": stack}
        ),
    )


def _pass(view: ModelView, given: Given, stack: StackName | None, layer: int) -> Pass:
    """Returns the pass over the one sentence, with what both streams need."""
    side = view.base_stack(stack)
    every = [*view.stacks[side][: layer + 1]]
    every += view.stacks["encoder"] if stack == "cross" else ()
    attention = view.stacks[side][layer].attention("cross" if stack == "cross" else "self")
    names = [name for block in every for name in (*block.points(), *needed(block))]
    names += [attention.query, attention.key, *([attention.scores] if attention.scores else [])]
    done = run_pass(
        view,
        given,
        layer=range(layer + 1),
        stack=stack,
        also=lambda block: () if block.layer else names,
        needs=frozenset({"pattern", "mixing"}),
    )
    if len(done.batch.main.ids) != 1:
        raise bad(
            "an edge is of one text",
            f"{len(done.batch.main.ids)} texts",
            "one text",
            "Ask about each alone.",
        )
    return done


def _place(name: str, given: int, count: int) -> int:
    """Returns a number from the end as one from the start."""
    if not -count <= given < count:
        raise bad(f"there is no such {name}", seen(given), f"0 to {count - 1}", "Choose another.")
    return given % count


def _position(name: str, given: int, mask: Tensor) -> int:
    """Returns a position of a sentence; negative ones count from its last token."""
    real = mask[0].nonzero()[:, 0].tolist()
    at = real[given] if -len(real) <= given < 0 else given
    if at not in real:
        raise bad(
            f"there is no such {name}",
            f"position {given}",
            f"{real[0]} to {real[-1]}, or -{len(real)} to -1",
            "Positions are those of tokens.",
        )
    return at


def _components(stream: Stream, by: By, layer: int) -> tuple[Tensor, Components]:
    """Returns what wrote to a stream, and its name; attention cut as asked, and a bias at last."""
    vectors, tables = [], []
    for component in stream.components:
        cut = by if isinstance(component, AttentionComponent) else "layer"
        for split in split_stream(replace(stream, components=(component,)), cut):
            there = split.there[0].nonzero()[:, 0]
            assert split.vectors is not None
            vectors.append(split.vectors()[0][there])
            tables.append(split.grid.at(there[None]))
            if split.bias is not None:
                vectors.append(split.bias[1][0])
                tables.append(split.bias[0].table())
    tables.append(Grid("bias", layer, stream.rows).table())
    return torch.cat(vectors), join(tables)


def _is_normed(
    view: ModelView, attention: AttentionSublayer, side: Side, raw: Tensor, shown: Tensor
) -> bool:
    """Returns whether a hook point shows queries, or keys, after their norm.

    Raises:
        UnsupportedModel: If it shows neither.
    """
    for after, found in ((False, raw), (True, side.finished(raw))):
        if found.shape == shown.shape:
            error = float((found - shown).abs().max() / shown.abs().max().clamp(min=1e-30))
            if error <= view.tolerance:
                return after
    raise UnsupportedModel(
        four_parts(
            "queries and keys of this head are not read correctly",
            f"{attention.query} or {attention.key}, which are not the stream times W_Q or W_K",
            "dense projections of the normed stream, with or without a norm of their own",
            "Latent attention and hooks that edit queries or keys are not supported here.",
        )
    )


def _require_sum(
    view: ModelView, attention: AttentionSublayer, found: float, score: float, pairs: Tensor
) -> None:
    """Raises UnsupportedModel where pairs do not add up to the model's own score."""
    error = abs(found - score) / max(abs(score), float(pairs.abs().max()), 1e-30)
    if not error <= view.tolerance:
        raise UnsupportedModel(
            four_parts(
                "the parts of this score do not add up",
                f"a relative error of {error:.2g}, {attention.pattern}",
                f"at most {view.tolerance:.0e}",
                "Take off hooks of your own that edit queries, keys or scores.",
            )
        )
