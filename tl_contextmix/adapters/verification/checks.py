"""The identities: recomputed quantities against the model's own activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import einsum
from torch import Tensor

from tl_contextmix.adapters.verification.identity_report import CheckRow
from tl_contextmix.adapters.verification.probe import (
    Probe,
    activation_error,
    pre_errors,
    relative_error,
)
from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import UnsupportedModel, four_parts


def check_rows(view: ModelView, probe: Probe) -> Iterator[CheckRow]:
    """Yields every identity of a view with settled blocks."""
    for stack, block in view.every_block():
        where = f"{stack} block {block.layer}"
        for attention in block.attentions:
            yield from _probe_rows(f"{where} {attention.kind}-attention", attention, probe)
        following = view.stacks[stack][block.layer + 1 :]
        output = following[0].resid_in if following else block.resid_out
        yield _block_row(where, block, probe.clean, output, probe.tolerance)
        ff = block.feed_forward
        if ff is not None:
            name = f"{where} feed-forward"
            yield from _pre_rows(name, block, ff, probe.clean, probe.tolerance)
            yield from _activation_rows(name, ff, probe.edited, probe.tolerance)


def _probe_rows(where: str, attention: AttentionSublayer, probe: Probe) -> Iterator[CheckRow]:
    pattern = probe.clean.pattern(attention).sum(-1)
    error = relative_error(pattern, torch.ones_like(pattern))
    yield CheckRow("pattern sums to 1", where, error, probe.tolerance)
    for name, trace in (("", probe.clean), (" after zeroing a value", probe.edited)):
        error = _mixing_error(attention, trace, None)
        yield CheckRow(f"pattern @ v = z{name}", where, error, probe.tolerance)


def _mixing_error(attention: AttentionSublayer, trace: Trace, real: Tensor | None) -> float:
    mixed = einsum(
        trace.pattern(attention),
        trace.value(attention),
        "batch head target source, batch source head d_head -> batch target head d_head",
    )
    return relative_error(mixed, trace[attention.mixed], real=real)


def _block_row(
    where: str,
    block: Block,
    trace: Trace,
    output: str,
    tolerance: float,
    real: Tensor | None = None,
) -> CheckRow:
    """Returns the identity of a block's output, relative to the block's update per position.

    The residual stream can be a thousand times longer than one block's update (the first token of
    GPT-2), which would hide a missing bias. In half precision the stream itself is rounded, so
    errors are relative to the stream; in single precision, to at least 2 % of it: 16 roundings,
    2e-6, over the tolerance.
    """
    expected = trace[output]
    added = (expected - trace.resid_in(block)).abs().amax(dim=-1, keepdim=True)
    share = 0.02 if tolerance <= 1e-4 else 1.0
    size = torch.maximum(added, share * expected.abs().amax(dim=-1, keepdim=True))
    error = relative_error(block.output(trace), expected, size=size, real=real)
    return CheckRow("recomputed block = block output", where, error, tolerance)


def _pre_rows(
    where: str,
    block: Block,
    ff: FeedForward,
    trace: Trace,
    tolerance: float,
    real: Tensor | None = None,
) -> Iterator[CheckRow]:
    for label, error in pre_errors(block, ff, trace, real):
        yield CheckRow(f"recomputed {label}", where, error, tolerance)


def _activation_rows(
    where: str, ff: FeedForward, trace: Trace, tolerance: float, real: Tensor | None = None
) -> Iterator[CheckRow]:
    if ff.activation is not None:
        error = activation_error(ff, trace, real)
        yield CheckRow(f"{ff.activation.name}(pre) = post", where, error, tolerance)


def readout_row(view: ModelView, probe: Probe) -> CheckRow:
    """Returns the identity of the readout, on which all methods with logits rely."""
    stack = view.base_stack(None)
    last = probe.clean[view.stacks[stack][-1].resid_out]
    logits = probe.clean.logits
    assert logits is not None
    error = relative_error(view.readout(last), logits.to(last))
    return CheckRow("readout(last residual) = logits", stack, error, probe.tolerance)


def require_followed(
    tolerance: float, trace: Trace, stack: str, blocks: Sequence[Block], cause: str
) -> None:
    """Checks that the identities still hold in a pass that hooks may have edited.

    Edits of values, patterns and a block's input are followed: results then describe the edited
    model. A decomposition cannot see edits after these, and would not match the pass.

    Args:
        tolerance: Largest relative error that counts as equal.
        trace: The pass, with the available `Block.checkpoints`.
        stack: The stack of the blocks.
        blocks: The requested blocks.
        cause: What may have edited the pass, as a clause for the message.

    Raises:
        UnsupportedModel: If an identity does not hold.
    """
    rows = [row for block in blocks for row in _pass_rows(trace, stack, block, tolerance)]
    worst = max(rows, key=lambda row: row.excess, default=None)
    if worst is None or worst.ok:
        return
    raise UnsupportedModel(
        four_parts(
            f"a map would not match this pass: {worst.identity} fails in {worst.where}, {cause}",
            f"a relative error of {worst.error:.2g}",
            f"at most {worst.tolerance:.0e}",
            "Hooks may edit values, attention patterns (if the host uses them) and the residual "
            "stream entering a block. Remove other hooks, or pass a cache made without them.",
        )
    )


def _pass_rows(trace: Trace, stack: str, block: Block, tolerance: float) -> Iterator[CheckRow]:
    """Yields the identities of a block for which the trace is complete."""
    where = f"{stack} block {block.layer}"
    there = set(trace.values)
    mask = trace.batch.side(stack).mask
    real = None if bool(mask.all()) else mask
    for attention in block.attentions:
        if attention.mixed in there:
            error = _mixing_error(attention, trace, real)
            place = f"{where} {attention.kind}-attention"
            yield CheckRow("pattern @ v = z", place, error, tolerance)
    ff = block.feed_forward
    if block.resid_out in there and (ff is None or ff.post in there):
        yield _block_row(where, block, trace, block.resid_out, tolerance, real)
    if ff is not None and {*ff.pre_names, ff.post} <= there:
        name = f"{where} feed-forward"
        yield from _pre_rows(name, block, ff, trace, tolerance, real)
        yield from _activation_rows(name, ff, trace, tolerance, real)
