"""The feed-forward pre-activation as a linear image of what an attention sublayer writes.

Up to its activation, what the feed-forward sublayer makes of a sum of attention terms is linear but
for the scales of norms, so W_O and W_in become one matrix per head. It is kept with the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, shift
from tl_contextmix.core.token_sums import AttentionTerm, FrozenNorm


@dataclass(frozen=True)
class Branch:
    """One branch of the feed-forward sublayer, seen from the attention sublayer that changes.

    Attributes:
        read: The sublayer's terms up to the branch's pre-activation, without scales.
        base: What enters it besides the sublayer's output, where that has a scale of its own.
        changed: The sublayer's output, without scales, and what enters besides where there is no
            ``base``.
        constant: What no scale divides.
    """

    read: AttentionTerm
    base: Float[Tensor, "batch target neuron"] | None
    changed: Float[Tensor, "batch target neuron"]
    constant: Float[Tensor, " neuron"]


def branches(
    block: Block,
    ff: FeedForward,
    attention: AttentionSublayer,
    read: AttentionTerm,
    raw: Float[Tensor, "batch target d_model"],
    before: Float[Tensor, "batch target d_model"],
    pre: tuple[Float[Tensor, "batch target neuron"], ...] | None,
    checked: bool = False,
) -> Iterator[Branch]:
    """Yields the branches of a block's feed-forward sublayer.

    Args:
        block: The block, with what it keeps.
        ff: Its feed-forward sublayer.
        attention: The attention sublayer that changes, the last one before it.
        read: That one's terms.
        raw: Its output, before a norm of it.
        before: The residual stream it adds to.
        pre: The model's own pre-activations, where the pass kept them, else None.
        checked: Whether `drop_stale_folds` was called since weights may have changed.
    """
    first = attention.norm_out
    second = ff.norm_in if attention.norm_after is None else attention.norm_after
    base = before
    if first is not None:
        bare = FrozenNorm((first,), torch.ones_like(read.scale))
        read, raw, base = read.linear(bare), first.linear(raw), shift(base, first.bias)
    scale = raw.new_ones(())
    if second is not None:
        scale = second.scale(raw + base)
        bare = FrozenNorm((second,), torch.ones_like(read.scale))
        read, raw, base = read.linear(bare), second.linear(raw), second.linear(base)
    for index, (weight, bias) in enumerate(ff.branches()):
        constant = shift(weight.new_zeros(weight.shape[1]), bias)
        if second is not None and second.bias is not None:
            constant = constant + second.bias @ weight
        if first is not None:
            changed = raw @ weight
        elif pre is None:
            changed = (raw + base) @ weight
        else:
            # One scale at most lies between the neurons and what entered.
            changed = (pre[index] - constant) * scale
        yield Branch(
            read=read.map(
                weight, _fold(block, _name(attention, index), read.weight, weight, checked)
            ),
            base=None if first is None else base @ weight,
            changed=changed,
            constant=constant,
        )


def drop_stale_folds(blocks: Sequence[Block], kind: str) -> None:
    """Forgets kept products of weights that have changed; asks a GPU about all of them at once.

    Args:
        blocks: The blocks.
        kind: Of the attention sublayers whose products are used next.
    """
    found, known = list[Tensor](), list[tuple[dict[str, tuple[Tensor, ...]], str]]()
    for block in blocks:
        ff = block.feed_forward
        if not block.folds or ff is None:
            continue
        attention = block.attention(kind)
        W_O, second = attention.W_O, attention.norm_after
        for norm in (attention.norm_out, ff.norm_in if second is None else second):
            W_O = W_O if norm is None else norm.linear(W_O)
        for index, (weight, _) in enumerate(ff.branches()):
            name = _name(attention, index)
            if name in block.folds:
                found.append((_marks(W_O, weight) == block.folds[name][0]).all())
                known.append((block.folds, name))
    if found:
        same = torch.stack([one.to(found[0].device) for one in found]).tolist()
        for (folds, name), holds in zip(known, same, strict=True):
            if not holds:
                del folds[name]


def _name(attention: AttentionSublayer, index: int) -> str:
    return f"{attention.kind} {index}"


def _fold(block: Block, name: str, W_O: Tensor, W_in: Tensor, checked: bool) -> Tensor | None:
    """Returns W_O, the linear parts of norms after it included, folded into W_in; None: not kept.

    Kept with a weighted sum of every column of the two: edits through ``.data`` leave no other
    trace. That costs as much as W_in at one vector.
    """
    kept = block.folds
    if kept is None:
        return None
    known = kept.get(name)
    if known is not None and (checked or torch.equal(_marks(W_O, W_in), known[0])):
        return known[1]
    known = kept[name] = (_marks(W_O, W_in), W_O @ W_in)
    return known[1]


def _marks(W_O: Tensor, W_in: Tensor) -> Float[Tensor, " column"]:
    return torch.cat([_column_sums(W_O.flatten(0, 1)), _column_sums(W_in)])


def _column_sums(matrix: Tensor) -> Tensor:
    rows = len(matrix)
    # Unequal weights, so that rows that change places are seen.
    return torch.linspace(1, 2, rows, dtype=matrix.dtype, device=matrix.device) @ matrix
