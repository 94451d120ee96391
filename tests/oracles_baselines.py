"""Slow, literal equations of the baselines' papers, with loops over tokens and heads.

Nothing of the package's maths is used: weights and activations come through the view.
"""

from __future__ import annotations

import torch
from oracles import Position, bias_of, frozen, integrated_gradients
from oracles_log_prob import Parts
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.token_sums import Norm

Row = tuple[list[Tensor], Tensor]


def rollout(weights: Tensor) -> Tensor:
    """Abnar & Zuidema 2020: 0.5 A + 0.5 I per layer, multiplied; weights [layer target source]."""
    out = []
    for layer in weights:
        mixed = 0.5 * layer + 0.5 * torch.eye(len(layer), dtype=layer.dtype)
        out.append(
            mixed
            / mixed.sum(-1, keepdim=True)
            @ (out[-1] if out else torch.eye(len(layer), dtype=layer.dtype))
        )
    return torch.stack(out)


def globenc(block: Block, trace: Trace, row: int, target: int, stack: str) -> Tensor:
    """GlobEnc, N-Enc of one position: both norms, the second with the true sum's scale."""
    parts, bias = Position(block, trace, row, target, stack).stream
    ff = block.feed_forward
    if ff is None or ff.norm_after is None:
        return torch.stack([part.norm() for part in parts])
    whole = sum(parts) + bias
    whole = whole + trace[ff.post][row, target] @ ff.W_out + ff.constant()
    return torch.stack([frozen(ff.norm_after, part, whole).norm() for part in parts])


def alti(block: Block, trace: Trace, row: int, target: int, stack: str) -> Tensor:
    """ALTI of one position, eq. 10: L1 distances to what the position becomes."""
    parts, bias = Position(block, trace, row, target, stack).stream
    whole = sum(parts) + bias
    scores = [whole.abs().sum() - (whole - part).abs().sum() for part in parts]
    return torch.stack([score if score > 0 else torch.zeros_like(score) for score in scores])


def _rolled(block: Block, trace: Trace, row: int, below: Tensor, memory: Tensor) -> Tensor:
    """A layer's contributions, a row of shares for each position, back to the input's tokens."""
    rows = []
    for target in range(trace.resid_in(block).shape[1]):
        scores = alti(block, trace, row, target, "decoder")
        reached = torch.zeros(below.shape[1], dtype=below.dtype)
        for source, score in enumerate(scores):
            before = below[source] if source < len(below) else memory[source - len(below)]
            reached = reached + score / scores.sum() * before
        rows.append(reached)
    return torch.stack(rows)


def alti_logit(view: ModelView, trace: Trace, row: int, pos: int, column: Tensor) -> Tensor:
    """ALTI-Logit of one prediction [layer source]: each layer's updates, back to the input."""
    stack = view.base_stack(None)
    blocks = view.stacks[stack]
    encoder = view.stacks.get("encoder", ()) if stack == "decoder" else ()
    count = trace.resid_in(blocks[0]).shape[1]
    other = trace.resid_in(encoder[0]).shape[1] if encoder else 0
    every = torch.eye(count + other, dtype=column.dtype)
    reached, memory = every[:count], every[count:]
    for block in encoder:
        memory = _rolled(block, trace, row, memory, memory[:0])
    stream = Parts(view, trace, stack, row, pos)
    whole, norm, found = stream.whole(), view.readout.norm, []
    for block in blocks:
        update = torch.zeros(count + other, dtype=column.dtype)
        for key, part in stream.parts.items():
            if key[1:3] == (block.layer, "h"):
                logit = frozen(norm, part, whole) * view.readout.scale @ column
                read = reached if key[0] == "attn" else memory
                update = update + logit * read[int(str(key[4]))]
        found.append(update)
        reached = _rolled(block, trace, row, reached, memory)
    return torch.stack(found)


def _normed(norm: Norm | None, row: Row) -> Row:
    parts, bias = row
    whole = sum(parts) + bias
    out = [frozen(norm, part, whole) for part in parts]
    shifted = frozen(norm, bias, whole)
    return out, shifted if norm is None or norm.bias is None else shifted + norm.bias


def _plus(one: Row, other: Row) -> Row:
    return [a + b for a, b in zip(one[0], other[0], strict=True)], one[1] + other[1]


def _attended(attention: AttentionSublayer, pattern: Tensor, target: int, read: list[Row]) -> Row:
    """Sum over heads and positions of the pattern times every token's value there."""
    W_V, b_V = attention.weights("W_V"), attention.weights("b_V")
    width = attention.W_O.shape[2]
    count = len(read[0][0])
    parts = [torch.zeros(width, dtype=pattern.dtype) for _ in range(count)]
    bias = bias_of(attention.b_O, parts[0]).clone()
    for head in range(pattern.shape[0]):
        for source, (rows, shift) in enumerate(read):
            weight = pattern[head, target, source]
            for k in range(count):
                parts[k] = parts[k] + weight * (rows[k] @ W_V[head] @ attention.W_O[head])
            value = shift @ W_V[head]
            value = value if b_V is None else value + b_V[head]
            bias = bias + weight * (value @ attention.W_O[head])
    return parts, bias


def decompx_layer(
    block: Block,
    trace: Trace,
    row: int,
    states: list[Row],
    memory: list[Row],
    steps: int,
    convention: str,
) -> list[Row]:
    """One layer of DecompX on every position's decomposed vectors."""
    stream = states
    for attention in block.attentions:
        pattern = trace.pattern(attention)[row]
        cross = attention.kind == "cross"
        read = memory if cross else [_normed(attention.norm_in, state) for state in stream]
        added = [
            _normed(attention.norm_out, _attended(attention, pattern, i, read))
            for i in range(len(stream))
        ]
        summed = [_plus(a, b) for a, b in zip(stream, added, strict=True)]
        stream = [_normed(attention.norm_after, state) for state in summed]
    ff = block.feed_forward
    if ff is None:
        return stream
    out = []
    for before, now in zip(states, stream, strict=True):
        parts, bias = _normed(ff.norm_in, before if block.parallel else now)
        added_row = integrated_gradients(ff, parts, bias, steps, convention)
        out.append(_normed(ff.norm_after, _plus(now, _normed(ff.norm_out, added_row))))
    return out


def embedded(x: Tensor, count: int, offset: int) -> list[Row]:
    """Every position of the input is its own token's."""
    zero = torch.zeros_like(x[0])
    return [
        ([x[i] if k == i + offset else zero for k in range(count)], zero) for i in range(len(x))
    ]


def decompx(
    blocks: list[Block],
    encoder: list[Block],
    final: Norm | None,
    trace: Trace,
    row: int,
    steps: int,
    convention: str,
) -> list[list[Row]]:
    """All layers of one sentence, an encoder first where there is one."""
    x = trace.resid_in(blocks[0])[row]
    memory: list[Row] = []
    count = len(x)
    if encoder:
        source = trace.resid_in(encoder[0])[row]
        count += len(source)
        memory = embedded(source, count, len(x))
        for block in encoder:
            memory = decompx_layer(block, trace, row, memory, [], steps, convention)
        memory = [_normed(final, state) for state in memory]
    states, out = embedded(x, count, 0), []
    for block in blocks:
        states = decompx_layer(block, trace, row, states, memory, steps, convention)
        out.append(states)
    return out
