"""Results that are asked about again: of which input they are, and what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.adapters.inputs.model_arguments import require_same_arguments
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import AttributionGraph, LogProbContributions, QueryContributions, Tokens

# The alternatives of each prediction.
Sets = tuple[tuple[int, ...], ...]


def earlier_answer(
    batch: Batch, view: ModelView, *given: object
) -> tuple[LogProbContributions | None, Batch]:
    """Returns the contributions that components were taken from, and the input they were found on.

    That is the batch, or longer by the answers that were asked about.

    Raises:
        InvalidInput: If a result is of other tokens.
    """
    results = [g for g in given if isinstance(g, (LogProbContributions, QueryContributions))]
    for result in results:
        require_same_arguments(view, result.provenance.options, batch)
        if isinstance(result, LogProbContributions):
            batch = _with_answer(batch, result, view)
        _require_same(view, batch, result, sentence_rows(result))
    return next((r for r in results if isinstance(r, LogProbContributions)), None), batch


def _require_same(
    view: ModelView,
    batch: Batch,
    result: LogProbContributions | QueryContributions | AttributionGraph,
    sentence: Int[Tensor, " row"],
) -> None:
    """Raises InvalidInput unless the sentences that a result is of are those of a batch."""
    sides = [(result.tokens, batch.side(view.base_stack(None)))]
    if result.encoder is not None:
        sides.append((result.encoder, batch.main))
    for tokens, side in sides:
        known = int(sentence.max()) + 1 == len(side.ids)
        same = known and torch.equal(tokens.ids.cpu(), side.ids.cpu()[sentence])
        if not same or not torch.equal(tokens.mask.cpu(), side.mask.cpu()[sentence]):
            raise InvalidInput(
                "the chosen components belong to another input",
                f"components found in {tokens.strings[0]}",
                f"components found in the tokens {side.ids.tolist()}, padding included",
                "Give the input, and its padding, that they were found on.",
            )


def require_same_text(view: ModelView, batch: Batch, graph: AttributionGraph) -> None:
    """Raises InvalidInput unless a graph is of this input."""
    require_same_arguments(view, graph.provenance.options, batch)
    _require_same(view, batch, graph, torch.zeros(1, dtype=torch.long))


def _with_answer(batch: Batch, result: LogProbContributions, view: ModelView) -> Batch:
    """Returns a batch with the answers of several tokens that a result is about."""
    side, sentence = batch.side(view.base_stack(None)), sentence_rows(result).tolist()
    if result.tokens.shape[1] <= side.ids.shape[1] or max(sentence) + 1 != len(side.ids):
        return batch
    first = [sentence.index(row) for row in range(len(side.ids))]
    ids, mask = result.tokens.ids[first].cpu(), result.tokens.mask[first].cpu()
    for row, place in enumerate(first):
        text = side.ids[row][side.mask[row]].cpu()
        before = mask[row].clone()
        before[int(result.pos[place]) + 1 :] = False  # an answer begins where it is predicted first
        if not torch.equal(ids[row][before], text):
            return batch
    longer = Side(ids.to(side.ids.device), mask.to(side.mask.device))
    return replace(batch, **{"main" if batch.decoder is None else "decoder": longer})


def sentence_rows(result: LogProbContributions | QueryContributions) -> Int[Tensor, " row"]:
    """Returns the sentence of each row, counted among those that the result is of."""
    return result.sentence.cpu().unique(return_inverse=True)[1]


def earlier_sets(
    result: LogProbContributions | AttributionGraph,
) -> tuple[Sets | None, Sets | None]:
    """Returns the target's tokens and the foil's that a result is about; None for a direction."""

    def sets(tokens: Tokens) -> Sets:
        pairs = zip(tokens.ids, tokens.mask, strict=True)
        return tuple(tuple(ids[mask].tolist()) for ids, mask in pairs)

    direction = isinstance(result, LogProbContributions) and result.of_direction
    target = None if direction else sets(result.target)
    return target, None if result.foil is None else sets(result.foil)


def label_sets(view: ModelView, sets: Sequence[Tensor]) -> Tokens:
    """Returns the labels of the tokens asked about, the alternatives of each side by side."""
    ids = pad_sequence([some.cpu() for some in sets], batch_first=True, padding_value=0)
    lengths = torch.tensor([len(some) for some in sets])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    strings = tuple(
        tuple(view.to_output(token) if real else "" for token, real in zip(row, there, strict=True))
        for row, there in zip(ids.tolist(), mask.tolist(), strict=True)
    )
    return Tokens(ids=ids, strings=strings, mask=mask, sides=(("target", ids.shape[1]),))
