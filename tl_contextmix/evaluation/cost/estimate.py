"""Estimates the FLOPs and memory of a method call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.generation import reads_anew
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.core.blocks import AttentionSublayer, Batch, FeedForward
from tl_contextmix.core.counters import Memory, Operations
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.model_view import Hooks, ModelView, NeedsModel, PassOutput
from tl_contextmix.core.validation import Positive, require_choice
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation.cost.meta_tensors import OnShapes
from tl_contextmix.results import Estimate, EstimatePart, Result

Lengths = tuple[int, ...]
_SHORT = (4, 8, 12)
_EXAMPLE = "For example: estimate(model, 1024, tl_contextmix.value_zeroing)."


def estimate(
    model: object,
    n_tokens: Positive,
    method: Callable[..., Any] | str,
    *,
    batch: Positive = 1,
    n_decoder_tokens: Positive | None = None,
) -> Estimate:
    """Returns the FLOPs and memory that a call would take, without running it.

    The code of the method and of the model runs on tensors that have shapes but no data, so the
    estimate covers what that code does, including tiling within ``max_bytes``.

    Tests hold it within 20 % of measurements (mostly within 4 %). Where work depends on the data,
    it is the minimum (``k`` of neurons: as if the bounds decided at once) or, of `flow` and
    ``generate``, the most there may be (``k`` nodes, so many tokens). Memory that an operator
    allocates and frees internally is not counted.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        n_tokens: Number of tokens of the input, the mask of a masked language model among them.
        method: Its name (``"value_zeroing"``), or the function, with ``functools.partial`` for
            options:
            ``partial(cm.attention_norms, at="mlp_out", max_bytes=2**28)``. Any function of a model
            and token ids that goes through this package, your own as well.
        batch: Number of inputs.
        n_decoder_tokens: Number of tokens of an encoder-decoder's decoder input; None for no
            decoder input.

    Returns:
        An `Estimate`: bytes of tensors in addition to the weights, and FLOPs of matrix products as
        `torch.utils.flop_counter` counts them.

    Raises:
        InvalidInput: If an argument is invalid, or the method rejects its options or an input of
            this length.
        UnsupportedModel: If the model is not supported.

    Cost: a fraction of a millisecond per operator of the method and the model, of any size.
    ``decoder_lens`` runs the model's own modules token by token, so it runs for real on three
    short inputs, fitted by a polynomial of second degree.
    """
    decoder = () if n_decoder_tokens is None else (n_decoder_tokens,)
    if isinstance(method, str):
        known = {name: one.function for name, one in methods().items() if one.estimated}
        require_choice("method", method, tuple(known))
        method = known[method]
    if isinstance(method, type):
        expected = "a function of a model and token ids"
        raise InvalidInput("unknown method", repr(method), expected, _EXAMPLE)
    view = as_view(model)
    lengths = (n_tokens, *decoder)
    tokens, others = _words(view, batch, lengths)
    make_batch(view, Given(tokens, **others))
    try:
        flops, peak, passes, parts = _dry(view, method, tokens, others)
    except NeedsModel:
        flops, peak, passes, parts = _short(model, view, method, batch, n_tokens)
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
    """Returns random token ids of these lengths, the decoder's as a keyword.

    None of them is padding; one of a masked language model is the mask, the last.
    """
    generator, how = torch.Generator().manual_seed(0), view.padding()
    mask = view.special_ids().get("mask") if "decoder" not in view.stacks else None
    never = torch.tensor([token for token in (mask, how and how.token) if token is not None])
    allowed = torch.arange(view.d_vocab)
    allowed = allowed[~torch.isin(allowed, never)]
    sides = [
        allowed[torch.randint(len(allowed), (batch, length), generator=generator)]
        for length in lengths
    ]
    if mask is not None:
        sides[0][:, -1] = mask
    return sides[0], dict(zip(("decoder_input",), sides[1:], strict=False))


_Cost = tuple[int, int, int, tuple[EstimatePart, ...]]


class _Counted:
    """A view whose passes are counted, and whose patterns say who reads whom.

    Attributes:
        view: The view.
        passes: Forward passes it was asked for.
        operations: What they took.
        kept: Bytes of the activations they keep.
    """

    def __init__(self, view: ModelView, shapes: OnShapes, counter: Operations) -> None:
        self.passes = self.operations = self.kept = 0
        self._run, self._shapes, self._counter = view.runner, shapes, counter
        attentions = [one for _, block in view.every_block() for one in block.attentions]
        self._attentions = {one.pattern: one for one in attentions}
        stacks = {
            # Products of weights that are kept for the next call must not be kept from here.
            name: tuple(
                replace(
                    block,
                    folds=None if block.folds is None else dict(block.folds),
                    feed_forward=_routing(block.feed_forward),
                )
                for block in blocks
            )
            for name, blocks in view.stacks.items()
        }
        self.view = replace(
            view,
            runner=self._counted,
            hooked=lambda backward=False: (),
            stacks=stacks,
            tables=dict(view.tables),
            facts=dict(view.facts),
            notice=lambda method, options: None,
            generate=self._said,
        )

    def _said(self, batch: Batch, count: int) -> list[list[int]]:
        """Returns as many tokens as a model may say, and runs what says them."""
        name = "main" if batch.decoder is None else "decoder"
        side, last = getattr(batch, name), self.view.blocks()[-1].resid_out
        for said in range(0 if reads_anew(self.view.host) else count - 1, count):
            read = side.each(
                lambda one, said=said: torch.cat([one, one[:, -1:].expand(-1, said)], 1)
            )
            self.view.run(replace(batch, **{name: read}), [last], logits=False)
        return side.ids[:, -1:].expand(-1, count).tolist()

    def _counted(
        self, batch: Batch, hooks: Hooks, grad: bool, watch: bool, logits: bool
    ) -> PassOutput:
        before = self._counter.total
        with self._shapes.throughout():
            output, values, added = self._run(batch, hooks, grad, watch, logits)
        self.passes += 1
        self.operations += self._counter.total - before
        kept = [*values.values(), *([] if output is None else [output])]
        self.kept += sum(value.nbytes for value in kept)
        for name in self._attentions.keys() & values.keys():
            values[name] = _reading(values[name], self._attentions[name])
        return output, values, added


def _routing(ff: FeedForward | None) -> FeedForward | None:
    """Returns a feed-forward sublayer that routes every token to as many experts as it does."""
    if not isinstance(ff, Experts):
        return ff
    count, active = len(ff.experts), ff.active

    def route(x: Tensor) -> Tensor:
        with _disable_current_modes():
            gains = torch.zeros(*x.shape[:-1], count, dtype=x.dtype)
            gains[..., -active:] = 1  # shared ones are last
        return gains

    return replace(ff, router=route)


def _reading(pattern: Tensor, attention: AttentionSublayer) -> Tensor:
    """Returns a pattern that reads what can be read: which tiles are computed depends on that."""
    with _disable_current_modes():
        reading = torch.ones(pattern.shape[2:], dtype=pattern.dtype)
        if attention.kind == "self" and attention.stack == "decoder":
            reading.tril_()
            if attention.window is not None:
                reading.triu_(1 - attention.window)
        reading = reading.expand(pattern.shape)
    reading.counted = pattern  # type: ignore[attr-defined] # its bytes live as long
    return reading


def _dry(
    view: ModelView, method: Callable[..., Any], tokens: Tensor, others: dict[str, Tensor]
) -> _Cost:
    with OnShapes(view.device) as shapes, Memory() as memory, Operations() as counter:
        counted = _Counted(view, shapes, counter)
        result = method(counted.view, tokens, **others)
    returned = min(_held(result), memory.peak)
    kept = min(counted.kept, memory.peak - returned)
    parts = (
        EstimatePart("forward passes", counted.operations, kept),
        EstimatePart("result", 0, returned),
        EstimatePart(
            "the method's work", counter.total - counted.operations, memory.peak - returned - kept
        ),
    )
    return counter.total, memory.peak, counted.passes, parts


def _short(
    model: object, view: ModelView, method: Callable[..., Any], batch: int, length: int
) -> _Cost:
    """Returns what calls on three short inputs say about one of the length that is meant."""
    short = [min(one, (view.n_ctx or 12) - 2 + index) for index, one in enumerate(_SHORT)]
    rows = []
    for each in (short[0], *short):  # twice: what is made once is no part of a call
        tokens, _ = _words(view, batch, (each,))
        with Memory() as memory, Operations() as counter:
            method(model, tokens)
        rows.append([counter.total, memory.peak])
    powers = torch.tensor([[1.0, n, n * n] for n in (*short, length)], dtype=torch.float64)
    fitted = torch.linalg.solve(powers[:-1], torch.tensor(rows[1:], dtype=torch.float64))
    flops, peak = (powers[-1] @ fitted).round().long().tolist()
    return flops, peak, 0, (EstimatePart("total", flops, peak),)


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
