"""The feed-forward pre-activation as a linear image of what an attention sublayer writes.

Up to its activation, what the feed-forward sublayer makes of a sum of attention terms is linear but
for the scales of norms, so W_O and W_in become one matrix per head. It is kept with the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, shift
from tl_contextmix.core.token_sums import AttentionTerm, FrozenNorm, Keep, multiply


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
    folds: Folds,
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
        folds: Products of weights that are kept.
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
        keep = None if block.folds is None else folds.keep(block, index)[-1]
        constant = shift(weight.new_zeros(weight.shape[1]), bias)
        if second is not None and second.bias is not None:
            constant = constant + second.bias @ weight
        if first is not None:
            changed = multiply(raw, weight)
        elif pre is None:
            changed = multiply(raw + base, weight)
        else:
            # One scale at most lies between the neurons and what entered.
            changed = (pre[index] - constant) * scale
        yield Branch(
            read=read.map(weight, keep),
            base=None if first is None else base @ weight,
            changed=changed,
            constant=constant,
        )


@dataclass
class Folds:
    """Products of W_O, the norms' linear parts after it included, with W_in that blocks keep.

    For one call: weights do not change in it. The first product that is asked for drops those of
    changed weights, of all blocks at once: a GPU is waited for.

    Attributes:
        blocks: The blocks.
        checked: Whether that was done.
    """

    blocks: Sequence[Block]
    checked: bool = False

    def keep(self, block: Block, branch: int) -> list[Keep]:
        """Returns what folds the W_O of each attention sublayer of a block into a branch's W_in."""
        assert block.folds is not None
        names = (_name(attention, branch) for attention in block.attentions)
        return [partial(self._fold, block.folds, name) for name in names]

    def _fold(
        self, kept: dict[str, tuple[Tensor, ...]], name: str, W_O: Tensor, W_in: Tensor
    ) -> Tensor:
        """Kept with a weighted sum of every column of the two.

        Edits through ``.data`` leave no other trace. That costs as much as W_in at one vector.
        """
        if not self.checked:
            self._drop_stale()
            self.checked = True
        known = kept.get(name)
        if known is None:
            known = kept[name] = (_marks(W_O, W_in), multiply(W_O, W_in))
        return known[1]

    def _drop_stale(self) -> None:
        found, known = list[Tensor](), list[tuple[dict[str, tuple[Tensor, ...]], str]]()
        for folds, name, W_O, W_in in chain.from_iterable(map(_kept, self.blocks)):
            found.append((_marks(W_O, W_in) == folds[name][0]).all())
            known.append((folds, name))
        if found:
            same = torch.stack([one.to(found[0].device) for one in found]).tolist()
            for (folds, name), holds in zip(known, same, strict=True):
                if not holds:
                    folds.pop(name, None)


def _kept(block: Block) -> Iterator[tuple[dict[str, tuple[Tensor, ...]], str, Tensor, Tensor]]:
    """Yields where a block keeps each product, its name, and the two weights as they are now."""
    ff, folds = block.feed_forward, block.folds
    if ff is None or not folds:
        return
    for place, attention in enumerate(block.attentions):
        for branch, (W_in, _) in enumerate(ff.branches()):
            name = _name(attention, branch)
            if name in folds:
                yield folds, name, _read(block, ff, place), W_in


def _read(block: Block, ff: FeedForward, place: int) -> Float[Tensor, "head d_head d_model"]:
    """Returns an attention sublayer's W_O as the neurons read it, scales of norms left out."""
    attention, W_O = block.attentions[place], block.attentions[place].W_O
    for norm in (
        attention.norm_out,
        *(one.norm_after for one in block.attentions[place:]),
        ff.norm_in,
    ):
        W_O = W_O if norm is None else norm.linear(W_O)
    return W_O


def _name(attention: AttentionSublayer, branch: int) -> str:
    return f"{attention.kind} {branch}"


def _marks(W_O: Tensor, W_in: Tensor) -> Float[Tensor, " column"]:
    return torch.cat([_column_sums(W_O.flatten(0, 1)), _column_sums(W_in)])


def _column_sums(matrix: Tensor) -> Tensor:
    rows = len(matrix)
    # Unequal weights, so that rows that change places are seen.
    return torch.linspace(1, 2, rows, dtype=matrix.dtype, device=matrix.device) @ matrix
