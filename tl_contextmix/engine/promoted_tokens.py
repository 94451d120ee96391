r"""Which tokens values promote: those of a whole layer, or of the memories that matter to a text.

What a value promotes takes a product with W_U, :math:`2 d V`; all values of a model take a hundred
passes over a text and more. Which memories promote the token that their layer's output promotes
takes a fraction of one: few tokens are such, so that nearly every value has a higher logit at some
other one of the first thousand. Only those that have not are read on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.core.blocks import Block, FeedForward
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.readout import TILE_BYTES, Unembedding
from tl_contextmix.core.token_sums import beside
from tl_contextmix.core.token_sums import blocks as blocks_of
from tl_contextmix.engine.memory_coefficients import (
    LayerComposition,
    LayerReadout,
    require_feed_forward,
    values,
)

# Values read at once: a second or so of a processor's time.
_TOGETHER = 512
# The least tokens at which values are compared before some of them are left out.
_FIRST = 16
# Columns of W_U whose lengths are computed at once.
_COLUMNS = 4096
# Bytes of values that are read together, and half of what they take.
_HELD = 2**26


def promoted(view: ModelView, block: Block, reader: Unembedding) -> Int[Tensor, "neuron side"]:
    """Returns the token each value promotes most, and the one it promotes times -1.

    Computed once for each model: it depends on weights alone. Large layers take minutes, with a
    progress bar.
    """
    key = _key(block, reader)
    if key not in view.tables:
        parts = values(require_feed_forward(block)).split(_TOGETHER)
        what = f"what values of layer {block.layer} promote"
        bar = tqdm(parts, desc=what, unit="part", delay=2, leave=False, disable=None)
        view.tables[key] = torch.cat([_promoted(part, reader) for part in bar])
    return view.tables[key]


def _key(block: Block, reader: Unembedding) -> str:
    return f"promoted, {reader.projection}, layer {block.layer}"


def _promoted(vectors: Tensor, reader: Unembedding) -> Int[Tensor, "neuron side"]:
    if reader.linear:
        return reader.scan(reader.hidden(vectors)).ids[:, :, 0]
    sides = [reader.scan(reader.hidden(vectors * sign), sides=1).ids[:, :, 0] for sign in (1, -1)]
    return torch.cat(sides, dim=1)


def promoted_at(
    readout: LayerReadout,
    blocks: Sequence[Block],
    found: Sequence[LayerComposition],
    named: Int[Tensor, "layer some"],
) -> Int[Tensor, "layer neuron side"]:
    """Returns what values promote, of those that matter to a text at least; -1 of others.

    These are the memories that agree with the output of their layer, and those that are named.

    Args:
        readout: How layers are read.
        blocks: The layers.
        found: How the memories of each make up its output.
        named: Which values of each are read whatever they promote: numbers of [neuron side].
    """
    reader, width = readout.table, found[0].coefficients.shape[1]
    tables = [readout.view.tables.get(_key(block, reader)) for block in blocks]
    known = [table for table in tables if table is not None]
    if len(known) == len(tables):
        return torch.stack(known)
    sizes, rows, read = _sizes(reader), list[tuple[Tensor, ...]](), list[Tensor]()
    every = torch.arange(2 * width * len(blocks)).view(len(blocks), -1)
    for block, one, some, numbers in zip(blocks, found, named, every, strict=True):
        vectors, columns = values(require_feed_forward(block)), reader.W_U[:, one.ffn_top]
        read.append(reader.hidden(vectors[some // 2] * (1 - some % 2 * 2)[:, None]))
        for side, active in enumerate(readout.firing(one)):
            for part in blocks_of(width, _TOGETHER):
                hidden = reader.hidden(vectors[part] * (1 - 2 * side))
                logits = reader.finish(hidden @ columns, one.ffn_top)
                best, room = logits.amax(1), _rounding(hidden, sizes)
                alike = logits >= (best - room)[:, None]
                agree = (alike & active[:, part].T).any(1)
                rows.append((agree, best + room, numbers[side::2][part]))
    agree, limits, numbers = map(torch.cat, zip(*rows, strict=True))
    stay = _where(agree, 0.5)
    others = _Values(reader, [require_feed_forward(block) for block in blocks], width)
    kept, hidden = others.highest(
        numbers[stay], limits[beside(limits, stay)], found[0].ffn_top.numel()
    )
    which = torch.cat([beside(named, every).gather(1, named).flatten(), beside(named, kept)])
    # Read as whole layers are; ties of equal columns of W_U still depend on rounding.
    vectors = torch.cat([*read, *hidden])
    result = named.new_full((every.numel(),), -1)
    result[which] = reader.scan(vectors, sides=1).ids[:, 0, 0]
    return result.view(len(blocks), width, 2)


@dataclass(frozen=True)
class _Values:
    """The values of some layers, by number of [layer neuron side].

    Which of them are meant stands on the host, so that a GPU is waited for as often whatever their
    number.

    Attributes:
        reader: How they are read.
        ffs: The feed-forward sublayers.
        width: How many values each has.
    """

    reader: Unembedding
    ffs: Sequence[FeedForward]
    width: int

    def hidden(self, numbers: Int[Tensor, " some"]) -> Iterator[Float[Tensor, "part d_model"]]:
        """Yields what W_U multiplies, of values in the order of their numbers."""
        W_U = self.reader.W_U
        for part in numbers.split(self._most):
            found = []
            for layer, ff in enumerate(self.ffs):
                inside = part[part // (2 * self.width) == layer] % (2 * self.width)
                if len(inside):
                    signs = beside(W_U, 1 - inside % 2 * 2)[:, None]
                    found.append(self.reader.hidden(values(ff.select(inside // 2)) * signs))
            if found:
                yield torch.cat(found)

    def highest(
        self, numbers: Int[Tensor, " some"], limits: Float[Tensor, " some"], tops: int
    ) -> tuple[Int[Tensor, " left"], Iterable[Float[Tensor, "part d_model"]]]:
        """Returns values of which no other token has a higher logit, as far as rounding lets see.

        And what W_U multiplies of them, as `hidden` does: few are kept, many are read anew.

        Args:
            numbers: The values.
            limits: The logit that none of a value's may exceed.
            tops: At how many tokens they were compared already.
        """
        start, d_vocab, kept = 0, self.reader.W_U.shape[1], list[Tensor]()
        while start < d_vocab and len(numbers):
            columns = slice(start, min(d_vocab, start + max((tops + start) // 2, _FIRST)))
            if not kept and len(numbers) <= self._most:
                kept = [*self.hidden(numbers)]
            every = kept or self.hidden(numbers)
            best = torch.cat([self._best(hidden, columns) for hidden in every])
            stay = _where(best <= limits, (tops + start) / (tops + columns.stop))
            there, start = beside(limits, stay), columns.stop
            numbers, limits, kept = numbers[stay], limits[there], [one[there] for one in kept]
        return numbers, kept or self.hidden(numbers)

    @property
    def _most(self) -> int:
        """How many values are read together."""
        W_U = self.reader.W_U
        return max(1, _HELD // (len(W_U) * W_U.element_size()))

    def _best(self, hidden: Tensor, columns: slice) -> Float[Tensor, " some"]:
        """Returns the highest logit of each value at some tokens."""
        room = TILE_BYTES // (4 * hidden.element_size() * len(hidden))
        found = []
        for part in blocks_of(columns.stop - columns.start, room):
            tokens = slice(columns.start + part.start, columns.start + part.stop)
            found.append(self.reader.finish(hidden @ self.reader.W_U[:, tokens], tokens).amax(1))
        return torch.stack(found).amax(0)


def _where(mask: Tensor, share: float) -> Int[Tensor, " some"]:
    """Returns where a mask is true, on the host; on shapes alone, how often in a random model."""
    if mask.is_meta:
        count = round(share * len(mask))
        return torch.arange(count) * len(mask) // max(1, count)
    return mask.nonzero()[:, 0].cpu()


def _sizes(reader: Unembedding) -> tuple[Tensor, Tensor]:
    """Returns the length of the longest column of W_U, and the largest number of b_U."""
    W_U, b_U = reader.W_U, reader.b_U
    each = [W_U[:, part].norm(dim=0).amax() for part in blocks_of(W_U.shape[1], _COLUMNS)]
    return torch.stack(each).amax(), W_U.new_zeros(()) if b_U is None else b_U.abs().amax()


def _rounding(hidden: Tensor, sizes: tuple[Tensor, Tensor]) -> Float[Tensor, " vector"]:
    """Returns how far apart two differences of logits may be that are computed in two ways."""
    longest, bias = sizes
    most = hidden.norm(dim=1) * longest + bias
    return 2 * hidden.shape[1] * torch.finfo(hidden.dtype).eps * most
