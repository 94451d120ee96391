"""What a question would take, before it is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch, provenance
from tl_contextmix.core.counters import Memory, Operations
from tl_contextmix.core.model_view import ModelView, NeedsModel
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import bad, require_choice
from tl_contextmix.evaluation.cost.fake_tensors import DryRun
from tl_contextmix.evaluation.cost.measured_model import Lengths, StandIn, measure, short_lengths
from tl_contextmix.results import Estimate, EstimatePart, Result

_EXAMPLE = "For example: estimate(model, 1024, tl_contextmix.value_zeroing)."


def estimate(
    model: object,
    n_tokens: Positive,
    method: Callable[..., Any] | str,
    *,
    batch: Positive = 1,
    n_decoder_tokens: Positive | None = None,
) -> Estimate:
    """Returns the operations and the memory that a question would take, without asking it.

    The method's own code runs, on tensors that have a shape and no numbers, so what is told is
    what that code would do, tiles within ``max_bytes`` included. The model itself runs on inputs of
    a few tokens only: what a forward pass does and holds at each instant is a polynomial of second
    degree in the number of tokens.

    Within 20 % of what is measured (tests; mostly within 4 %). Where the amount of work depends on
    the numbers it is told for the least (``k`` of neurons: as if the bounds decided at once),
    and for ones that underflow nowhere. Sliding windows of more than 12 tokens count as if there
    were none. What code allocates inside of one operator and frees again is not counted.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        n_tokens: How many tokens the input would have.
        method: Its name (``"value_zeroing"``), or the function, with ``functools.partial`` where it
            gets options:
            ``partial(cm.attention_norms, at="mlp_out", max_bytes=2**28)``. Any function of a model
            and token ids that goes through this package, your own as well.
        batch: How many inputs there would be.
        n_decoder_tokens: How many tokens the decoder input of an encoder-decoder would have; None
            where none would be given.

    Returns:
        An `Estimate`. The numbers are bytes of tensors beside the weights, and operations in
        products of matrices, as `torch.utils.flop_counter` counts them.

    Raises:
        InvalidInput: If a number or the method is none, or the method refuses its options or an
            input of this length.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: forward passes over up to 12 tokens (four for one stack, seven for two), and about a
    tenth of a millisecond for every operator of the method, whatever its size. ``decoder_lens``
    runs the model's own modules, one token after the other: it is asked for real on as many short
    inputs.
    """
    decoder = () if n_decoder_tokens is None else (n_decoder_tokens,)
    if isinstance(method, str):
        known = {name: one.function for name, one in methods().items() if one.estimated}
        require_choice("method", method, tuple(known))
        method = known[method]
    if isinstance(method, type):
        expected = "a function of a model and token ids"
        raise bad("there is no such method", repr(method), expected, _EXAMPLE)
    view = as_view(model)
    lengths = (n_tokens, *decoder)
    tokens, others = _words(view, batch, lengths)
    make_batch(view, Given(tokens, **others))
    try:
        flops, peak, passes, parts = _dry(view, method, tokens, others)
    except NeedsModel:
        flops, peak, passes, parts = _short(model, view, method, batch, lengths)
    name = _name(method)
    return Estimate(
        method=name,
        batch=batch,
        n_tokens=n_tokens,
        n_decoder_tokens=n_decoder_tokens or 0,
        flops=flops,
        peak_bytes=peak,
        passes=passes,
        parts=parts,
        provenance=provenance(view, "estimate", {"method": name, "batch": batch}),
    )


def _words(view: ModelView, batch: int, lengths: Lengths) -> tuple[Tensor, dict[str, Any]]:
    """Returns token ids of some lengths, and the decoder's as a keyword."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.randint(view.d_vocab, (batch, length), generator=generator) for length in lengths
    ]
    how = view.padding()
    if how is not None:  # words that were drawn are no padding
        sides = [torch.where(ids == how.token, (ids + 1) % view.d_vocab, ids) for ids in sides]
    return sides[0], dict(zip(("decoder_input",), sides[1:], strict=False))


_Found = tuple[int, int, int, tuple[EstimatePart, ...]]


def _dry(
    view: ModelView, method: Callable[..., Any], tokens: Tensor, others: dict[str, Tensor]
) -> _Found:
    with DryRun() as dry, Memory() as memory, Operations() as counter:
        host = StandIn(view, dry, memory)
        result = method(host.view, tokens, **others)
    returned = min(_held(result), memory.peak)
    kept = min(host.kept, memory.peak - returned)
    parts = (
        EstimatePart("forward passes", host.operations, kept),
        EstimatePart("result", 0, returned),
        EstimatePart("the method's work", counter.total, memory.peak - returned - kept),
    )
    return counter.total + host.operations, memory.peak, host.passes, parts


def _short(
    model: object, view: ModelView, method: Callable[..., Any], batch: int, lengths: Lengths
) -> _Found:
    """Returns what short inputs, asked for real, say about one of the length that is meant."""

    def work(short: Lengths) -> dict[str, Tensor]:
        tokens, others = _words(view, batch, short)
        method(model, tokens, **others)
        return {}

    flops, peak = measure(work, short_lengths(len(lengths), view.n_ctx)).at(lengths)
    return flops, peak, 0, (EstimatePart("in all", flops, peak),)


def _held(result: object) -> int:
    """Returns the bytes of the tensors in a result."""
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    if isinstance(result, dict):
        return sum(map(_held, result.values()))
    if isinstance(result, (list, tuple)):
        return sum(map(_held, result))
    if isinstance(result, Result):
        return sum(_held(getattr(result, field.name)) for field in dataclasses.fields(result))  # type: ignore[arg-type]
    return 0


def _name(method: Callable[..., Any]) -> str:
    if not isinstance(method, partial):
        return getattr(method, "__name__", type(method).__name__)
    options = [*map(repr, method.args), *(f"{k}={v!r}" for k, v in method.keywords.items())]
    return f"{_name(method.func)}({', '.join(options)})"
