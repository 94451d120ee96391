"""The identities: recomputed quantities against the model's own activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tl_contextmix.adapters.verification.identity_report import CheckRow
from tl_contextmix.adapters.verification.probe import (
    Probe,
    activation_error,
    pre_errors,
    relative_error,
)
from tl_contextmix.core.blocks import (
    AttentionSublayer,
    Block,
    FeedForward,
    Identity,
    Trace,
    require_weight,
    shift,
)
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import UnsupportedModel


def check_rows(view: ModelView, probe: Probe) -> Iterator[CheckRow]:
    """Yields every identity of a view with settled blocks."""
    for stack, block in view.every_block():
        where = f"{stack} block {block.layer}"
        for attention in block.attentions:
            place = f"{where} {attention.kind}-attention"
            yield from _probe_rows(place, attention, probe)
            yield from _value_rows(place, attention, probe.clean.resid_in(block), probe)
        following = view.stacks[stack][block.layer + 1 :]
        output = following[0].resid_in if following else block.resid_out
        yield _block_row(where, block, probe.clean, output, probe.tolerance)
        for ff in block.feed_forwards:
            name = f"{where} {_called(ff)}"
            yield from _pre_rows(name, block, ff, probe.clean, probe.tolerance)
            yield from _activation_rows(name, ff, probe.edited, probe.tolerance)


def _called(ff: FeedForward) -> str:
    return "feed-forward" if ff.kind == "mlp" else ff.kind


def _probe_rows(where: str, attention: AttentionSublayer, probe: Probe) -> Iterator[CheckRow]:
    pattern, identity = probe.clean.pattern(attention), "pattern sums to 1"
    expected = torch.ones_like(pattern[..., 0])
    if attention.sink_scores:
        scores, identity = probe.clean[attention.sink_scores], "pattern and sink sum to 1"
        logit = require_weight(attention.weights, "sinks")[:, None, None].expand_as(scores[..., :1])
        expected = 1 - torch.cat([scores, logit], dim=-1).softmax(-1)[..., -1]
    error = relative_error(pattern.sum(-1), expected)
    yield CheckRow(identity, where, error, probe.tolerance)
    for name, trace in (("", probe.clean), (" after zeroing a value", probe.edited)):
        error = _mixing_error(attention, trace, None)
        yield CheckRow(f"pattern @ v = z{name}", where, error, probe.tolerance)


def _value_rows(
    where: str, attention: AttentionSublayer, stream: Tensor, probe: Probe
) -> Iterator[CheckRow]:
    """Yields the identity of values that a norm divides, on which W_V's users rely."""
    x = stream if attention.norm_in is None else attention.norm_in(stream)
    scale = attention.value_scale(x)
    if scale is not None:
        value = shift(torch.einsum("...m,hmd->...hd", x, attention.W_V), attention.weights("b_V"))
        error = relative_error(value / scale, probe.clean.value(attention))
        yield CheckRow("normed x W_V = v", where, error, probe.tolerance)


def _mixing_error(
    attention: AttentionSublayer, trace: Trace, real: Tensor | None, edit: Tensor | None = None
) -> float:
    """Returns the error of pattern @ v, against z or z before an edit of it."""
    expected = trace[attention.mixed]
    if edit is not None:
        expected = expected - edit.reshape_as(expected)
    return relative_error(trace.mix(attention), expected, real=real)


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
        yield CheckRow(label, where, error, tolerance)


def _activation_rows(
    where: str, ff: FeedForward, trace: Trace, tolerance: float, real: Tensor | None = None
) -> Iterator[CheckRow]:
    if ff.activation is not None:
        error = activation_error(ff, trace, real)
        name = "experts = output" if ff.routes else f"{ff.activation.name}(pre) = post"
        yield CheckRow(name, where, error, tolerance)


def readout_row(view: ModelView, probe: Probe) -> CheckRow:
    """Returns the identity of the readout, on which all methods with logits rely."""
    stack = view.base_stack(None)
    last = probe.clean[view.stacks[stack][-1].resid_out]
    logits = probe.clean.logits
    assert logits is not None
    error = relative_error(view.readout(last), logits.to(last))
    return CheckRow("readout(last residual) = logits", stack, error, probe.tolerance)


# What to do where something does not hold of a pass that hooks edited.
_VALUES = (
    "Edit hook_v instead of hook_z: zeroed values ablate a head, and what is read is then known "
    "source by source. log_prob_contributions by 'layer' and 'head' follow a z that is edited"
)
_REMEDIES: dict[Identity, str] = {
    "pattern": "Edits of attention patterns are followed where the host uses them. "
    "With hooks on z, leave `cache` out and the hooks on the model",
    "z": _VALUES,
    "mixing": _VALUES,
    "attn": "Edit hook_v, or the stream (hook_resid_pre, hook_resid_mid), not hook_attn_out. "
    "log_prob_contributions by 'layer' follow edits of a sublayer's output",
    "read": "Steer at hook_resid_pre, where the stream itself is edited: a hook on a norm, or a "
    "bridge's hook_resid_mid (ln2.hook_in), edits what the neurons read and not the stream. "
    "log_prob_contributions follow both",
    "activation": "Ask for a point in front of the neurons (at='mlp_in'), or "
    "log_prob_contributions, which take neurons as they are edited",
    "mlp": "Edit hook_post, or the stream (hook_resid_pre, hook_resid_post), instead of "
    "hook_mlp_out. log_prob_contributions by 'layer' follow edits of a sublayer's output",
    "block": "Hooks may edit values, attention patterns (if the host uses them), heads, neurons, "
    "sublayers' outputs and the residual stream",
    "unsteered": "Steer at hook_resid_pre: what enters the block is then as the hook leaves it",
}


def follow(
    tolerance: float,
    trace: Trace,
    stack: str,
    blocks: Sequence[Block],
    needs: frozenset[Identity],
    hooked: Sequence[str] | None,
) -> Trace:
    """Returns a pass that hooks may have edited, knowing which heads they changed.

    The trace has the available `Block.checkpoints`; where hooks are is None for a cache.

    Raises:
        UnsupportedModel: If something that the method needs does not hold of the pass.
    """
    changed = frozenset(
        attention.mixed
        for block in blocks
        for attention in block.attentions
        if attention.mixed in trace.edits
        or (
            attention.mixed in trace.values
            and not _mixing_error(attention, trace, _real(trace, stack)) <= tolerance
        )
    )
    trace = replace(trace, changed=changed, edited=True)
    rows = [row for block in blocks for row in _pass_rows(trace, stack, block, needs, tolerance)]
    failed: list[tuple[Identity, CheckRow]] = [pair for pair in rows if not pair[1].ok]
    if not failed:
        return trace
    identity, worst = max(failed, key=lambda pair: pair[1].excess)
    cause = "as the cache holds it"
    if hooked is not None:
        # Those that were seen to edit come first; of modules that are no hook points it is unknown.
        edits = [one for one in hooked if set(_names(one)) & trace.edits.keys()]
        places = edits or [*hooked]
        cause = f"with hooks of your own at {', '.join(places[:3])}"
        cause += ", ..." if len(places) > 3 else ""
    raise UnsupportedModel(
        f"this would not match the pass: {worst.identity} fails in {worst.where}, {cause}",
        f"a relative error of {worst.error:.2g}",
        f"at most {worst.tolerance:.0e}",
        f"{_REMEDIES[identity]}. Remove other hooks, or pass a cache made without them.",
    )


def _names(place: str) -> list[str]:
    """Returns the names by which a message calls a hook point."""
    return place.replace(")", "").split(" (")


def _real(trace: Trace, stack: str) -> Tensor | None:
    mask = trace.batch.side(stack).mask
    return None if bool(mask.all()) else mask


def _pass_rows(
    trace: Trace, stack: str, block: Block, needs: frozenset[Identity], tolerance: float
) -> Iterator[tuple[Identity, CheckRow]]:
    """Yields what is needed of a block, as far as the trace has what it takes."""
    where, real, there = f"{stack} block {block.layer}", _real(trace, stack), set(trace.values)
    for attention in block.attentions:
        place = f"{where} {attention.kind}-attention"
        if attention.mixed in there:
            yield from _head_rows(place, attention, trace, needs, tolerance, real)
        if "attn" in needs:
            error = _edit_error(trace, attention, real)
            yield "attn", CheckRow("heads + bias = attention output", place, error, tolerance)
    if "unsteered" in needs:
        for sublayer in block.sublayers:
            added = trace.edit(sublayer.edits.stream)
            error = 0.0 if added is None else _size(added, trace.resid_in(block), real)
            yield (
                "unsteered",
                CheckRow("nothing else on the stream", where, error, tolerance),
            )
    last = [ff.post for ff in block.feed_forwards]
    if "block" in needs and there.issuperset((block.resid_out, *last)):
        yield "block", _block_row(where, block, trace, block.resid_out, tolerance, real)
    for ff in block.feed_forwards:
        name = f"{where} {_called(ff)}"
        if "read" in needs and set(ff.read_names) <= there:
            for row in _pre_rows(name, block, ff, trace, tolerance, real):
                yield "read", row
        if "activation" in needs and there.issuperset((*ff.shown(), *ff.held_names)):
            for row in _activation_rows(name, ff, trace, tolerance, real):
                yield "activation", row
        if "mlp" in needs:
            error = _edit_error(trace, ff, real)
            yield "mlp", CheckRow("neurons + bias = feed-forward output", name, error, tolerance)


def _head_rows(
    place: str,
    attention: AttentionSublayer,
    trace: Trace,
    needs: frozenset[Identity],
    tolerance: float,
    real: Tensor | None,
) -> Iterator[tuple[Identity, CheckRow]]:
    changed = attention.mixed in trace.changed
    if "pattern" in needs:
        edit = trace.edit((attention.mixed,)) if changed else None
        error = _mixing_error(attention, trace, real, edit)
        yield "pattern", CheckRow("pattern @ v = z before hooks", place, error, tolerance)
    if "z" in needs:
        error = _mixing_error(attention, trace, real)
        yield "z", CheckRow("pattern @ v = z", place, error, tolerance)
    if "mixing" in needs and changed:
        mixed = trace.mix(attention, trace.mixing(attention))
        expected = trace[attention.mixed]
        # Beside the heads before the edit: of all of them ablated nothing is left.
        size = torch.maximum(expected.abs().max(), trace.mix(attention).abs().max())
        error = relative_error(mixed, expected, size=size, real=real)
        yield "mixing", CheckRow("a factor * pattern @ v = z", place, error, tolerance)


def _edit_error(
    trace: Trace, sublayer: AttentionSublayer | FeedForward, real: Tensor | None
) -> float:
    """Returns how large what hooks added to a sublayer's output is, beside that."""
    added = trace.edit((*sublayer.edits.raw, *sublayer.edits.out))
    return 0.0 if added is None else _size(added, sublayer.output(trace) - added, real)


def _size(added: Tensor, beside: Tensor, real: Tensor | None) -> float:
    return relative_error(beside + added, beside, real=real)
