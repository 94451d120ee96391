"""How memories make up predictions over a corpus: the figures of the 2021 paper, with counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.passes import fresh_trace, provenance
from tl_contextmix.core.model_view import select_blocks
from tl_contextmix.core.validation import Layers, NotNegative, Positive
from tl_contextmix.engine.memory_coefficients import (
    CASES,
    Active,
    LayerReadout,
    active_rule,
    readings,
    require_feed_forward,
    require_predicting,
)
from tl_contextmix.engine.promoted_tokens import promoted
from tl_contextmix.engine.registry import method
from tl_contextmix.methods.memories.corpus_formats import open_corpus
from tl_contextmix.methods.memories.shards import (
    Cutting,
    Documents,
    Malformed,
    TooLong,
    batches,
    expect,
    progress,
    read_shards,
    warn_of_little,
)
from tl_contextmix.results import CompositionFigures


@method(cites=("geva2021transformer",), on_text=False)
def composition(
    model: object,
    corpus: object,
    *,
    column: str | None = None,
    layer: Layers | None = None,
    pos: Literal["random", "all"] = "random",
    seed: NotNegative = 0,
    active: Active | None = None,
    projection: Literal["model", "frozen", "none"] = "model",
    prepend_bos: bool | None = None,
    too_long: TooLong = "cut",
    malformed: Malformed = "error",
    batch_size: Positive = 16,
) -> CompositionFigures:
    """Returns the figures of `ff_memories` over a corpus, per layer, with counts.

    Share of active memories, zero-agreement rate, residual = output rate, probability of the final
    token, and how often each case is (Geva, Schuster, Berant, Levy 2021, EMNLP, figures 7 to 11).

    Args:
        model: Any TransformerLens model with a vocabulary readout and one stack.
        corpus: As `mine_triggers` takes it.
        column: Column of the texts, see `mine_triggers`.
        layer: Layer or layers; None for all.
        pos: ``"random"``: one position of each document, as in the paper, drawn by its
            number and ``seed``; ``"all"`` of them.
        seed: Of the draw.
        active: See `ff_memories`.
        projection: See `ff_memories`.
        prepend_bos: Whether documents get a beginning-of-sequence token; None: model's default.
        too_long: See `mine_triggers`.
        malformed: See `mine_triggers`.
        batch_size: Documents in a batch.

    Returns:
        `CompositionFigures`; special tokens do not count. What was skipped is among
        the options of its provenance.

    Raises:
        InvalidInput: If an argument does not fit the model, or a document cannot be used.
        UnsupportedModel: If the model has no trained vocabulary readout, or hooks of the user's
            own edit it where the readout does not follow.

    Warns:
        ContextMixWarning: If no position counted, or more tokens were cut off than read.

    Cost: a forward pass over the corpus and ``6 d_model d_vocab`` operations per position and
    layer; once per model ``2 d_mlp d_model d_vocab`` per layer for what values promote.
    """
    view = as_view(model)
    stack = view.base_stack(None)
    require_predicting(view, stack)
    if len(view.stacks) == 2:
        require_predicting(view, "encoder")
    how = readings(view, projection)
    blocks = select_blocks(view.blocks(), layer)
    rule = active_rule(active, require_feed_forward(blocks[0]).gated)
    cutting = Cutting(16 * batch_size, batch_size, too_long, malformed, prepend_bos, special=False)
    opened = open_corpus(corpus, column)
    names = [n for block in blocks for n in (*block.points(), *LayerReadout.names(view, block))]
    # Over a corpus counts pass 2 ** 24, where float32 stops counting.
    sums = torch.zeros(len(blocks), 4 + len(CASES), dtype=torch.float64)
    counts, examples, read, whole = Counter(), 0, 0, opened.size()
    with torch.no_grad(), progress("composition") as bar:
        for shard in read_shards(opened, cutting.shard_size):
            read += shard.size
            for documents in batches(view, shard, cutting, opened.name, counts):
                where = documents.counted if pos == "all" else _draw(documents, seed)
                trace = fresh_trace(view, documents.batch, stack, blocks, names, LayerReadout.NEEDS)
                readout = LayerReadout.of(view, trace, how, rule, where)
                for row, block in zip(sums, blocks, strict=True):
                    one = readout.read(block, trace)
                    agreeing = readout.agreeing(one, promoted(view, block, how[1]))
                    row += one.sums(readout.final, agreeing).cpu()
                examples += int(where.sum())
                bar.update(int(documents.batch.main.mask.sum()))
            expect(bar, read, whole)
    warn_of_little(counts)
    options = {"pos": pos, "active": rule, "projection": projection, **counts}
    return CompositionFigures(
        sums=sums,
        examples=examples,
        layers=tuple(block.layer for block in blocks),
        cases=CASES,
        provenance=provenance(view, "composition", options),
    )


def _draw(documents: Documents, seed: int) -> Tensor:
    """Returns one position of each document, the same whatever else is in the batch."""
    where = torch.zeros_like(documents.counted)
    for row, number in enumerate(documents.numbers.tolist()):
        known = documents.counted[row].nonzero()[:, 0]
        where[row, known[draw(len(known), seed, number)]] = True
    return where


def draw(count: int, *key: int) -> int:
    """Returns a number below ``count`` that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
