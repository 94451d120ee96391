r"""Which tokens values promote: those of a whole layer, or of the memories that matter to a text.

What a value promotes takes a product with W_U, :math:`2 d V`; all values of a model take a hundred
passes over a text and more. Which memories promote the token that their layer's output promotes
takes a fraction of one: few tokens are such, so that nearly every value has a higher logit at some
other one of the first thousand. Only those that have not are read on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.readout import TILE_BYTES, Unembedding
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
# Bytes of values that are compared together, and half of what they take.
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
    sizes, rows, held = _sizes(reader), list[tuple[Tensor, ...]](), 0
    every = torch.arange(2 * width * len(blocks), device=named.device).view(len(blocks), -1)
    read = list[tuple[Tensor, Tensor]]()
    for block, one, some, numbers in zip(blocks, found, named, every, strict=True):
        vectors, columns = values(require_feed_forward(block)), reader.W_U[:, one.ffn_top]
        signed = vectors[some // 2] * (1 - some % 2 * 2)[:, None]
        read.append((numbers[some], reader.hidden(signed)))
        for side, active in enumerate(readout.firing(one)):
            for part in blocks_of(width, _TOGETHER):
                hidden = reader.hidden(vectors[part] * (1 - 2 * side))
                logits = reader.finish(hidden @ columns, one.ffn_top)
                best, room = logits.amax(1), _rounding(hidden, sizes)
                alike = logits >= (best - room)[:, None]
                agree = (alike & active[:, part].T).any(1)
                rows.append((agree, numbers[side::2][part], best + room, hidden))
                held += hidden.nbytes
                if held >= _HELD:
                    read.append(_highest(reader, rows, len(one.ffn_top)))
                    rows, held = [], 0
    if rows:
        read.append(_highest(reader, rows, len(found[0].ffn_top)))
    # Read as whole layers are; ties of equal columns of W_U still depend on rounding.
    which, vectors = map(torch.cat, zip(*read, strict=True))
    tokens = reader.scan(vectors, sides=1).ids[:, 0, 0]
    result = tokens.new_full((every.numel(),), -1)
    result[which] = tokens
    return result.view(len(blocks), width, 2)


def _highest(
    reader: Unembedding, rows: Sequence[tuple[Tensor, ...]], tops: int
) -> tuple[Int[Tensor, " row"], Float[Tensor, "row d_model"]]:
    """Returns values of which no other token has a higher logit, as far as rounding lets one see.

    Args:
        reader: How values are read.
        rows: Of values: whether they are asked about, their numbers, the logit that none may
            exceed, and what W_U multiplies.
        tops: At how many tokens they were compared already.
    """
    agree, *left = map(torch.cat, zip(*rows, strict=True))
    # Once for all of these: a GPU is waited for.
    stay, start, W_U = _where(agree, 0.5), 0, reader.W_U
    numbers, limits, hidden = (one[stay] for one in left)
    while start < W_U.shape[1] and len(numbers):
        room = TILE_BYTES // (4 * hidden.element_size() * len(numbers))
        columns = slice(start, start + max(1, min(max((tops + start) // 2, _FIRST), room)))
        logits = reader.finish(hidden @ W_U[:, columns], columns)
        stay = _where(logits.amax(1) <= limits, (tops + start) / (tops + columns.stop))
        numbers, limits, hidden = (one[stay] for one in (numbers, limits, hidden))
        start = columns.stop
    return numbers, hidden


def _where(mask: Tensor, share: float) -> Int[Tensor, " some"]:
    """Returns where a mask is true, and on shapes alone how often it is in a random model."""
    return torch.arange(round(share * len(mask))) if mask.is_meta else mask.nonzero()[:, 0]


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
