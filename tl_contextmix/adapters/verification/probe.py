"""The forward pass that is looked at, and the reading of each block that they support."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tl_contextmix.core.activations import ACTIVATIONS, Activation
from tl_contextmix.core.blocks import (
    AttentionSublayer,
    Batch,
    Block,
    FeedForward,
    Side,
    Trace,
    affine,
)
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.finite import says_nothing, why_not_finite
from tl_contextmix.core.later_attention import cross_pattern
from tl_contextmix.core.model_view import Edit, ModelView
from tl_contextmix.errors import UnsupportedModel, four_parts

# Correct readings measure at most 4e-7 in float32, 1e-3 in float16 and 1.2e-2 in bfloat16 over the
# families of the test zoo (2e-7 in float64, where hosts compute in float32); wrong ones 0.1 to 10.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# Below this share of the tolerance no other reading is looked for.
_ROUNDING = 0.01
# TF32 has a 10-bit mantissa, like float16.
_TF32 = _TOLERANCE[torch.float16]
# The grid must distinguish gelu from gelu_new, which differ by at most 4.7e-4, near 2.
_GRID = 8.0
_LENGTH = 4
# Neurons that a reading which is wrong is dropped by, without a look at the rest.
_FEW = 64


def tolerance_of(dtypes: set[torch.dtype], device: torch.device) -> float:
    """Returns the largest relative error that counts as equal at a model's precision.

    Args:
        dtypes: Dtypes of the weights; the coarsest decides.
        device: Device of the model.
    """
    tolerance = max((_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    if device.type == "cuda" and torch.float32 in dtypes and _tensor_float():
        tolerance = max(tolerance, _TF32)
    return tolerance or _TOLERANCE[torch.float32]


def _tensor_float() -> bool:
    """Whether PyTorch multiplies float32 matrices in TF32."""
    matmul = torch.backends.cuda.matmul
    # Newer versions raise if the old name is read after setting the new one.
    chosen = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if chosen is None else chosen == "tf32"


@dataclass(frozen=True)
class Probe:
    """A forward pass over four tokens, and one with edits.

    Attributes:
        clean: Without edits.
        edited: With first values zeroed and a grid as every neuron's input.
        tolerance: Largest relative error that counts as equal.
    """

    clean: Trace
    edited: Trace
    tolerance: float


def run_probe(view: ModelView) -> Probe:
    """Runs both over fixed tokens, in one batch; the view's blocks only need hook names."""
    batch = probe_batch(view)
    names, edits = [], {}
    for _, block in view.every_block():
        names += [*block.points(), *block.checkpoints()]
        names += [a.key for a in block.attentions if a.kind == "cross"]
        names += [a.sink_scores for a in block.attentions if a.sink_scores]
        edits |= {a.value: _zero_first for a in block.attentions}
        for ff in block.feed_forwards:
            edits |= dict.fromkeys(ff.pre_names[:1], _grid)
    clean, edited = _both(view, batch, names, edits)
    # Readings of a block share most of what is recomputed, and it is recomputed again as a check.
    return Probe(replace(clean, known={}), replace(edited, known={}), view.tolerance)


def _both(
    view: ModelView, batch: Batch, names: Sequence[str], edits: Mapping[str, Edit]
) -> tuple[Trace, Trace]:
    """Returns a pass without edits and one with them: rows of one batch, where all has rows."""
    twice = batch.each(lambda tensor: torch.cat([tensor, tensor]))
    halves = {name: partial(_second, edit) for name, edit in edits.items()}
    both = view.run(twice, names, edits=halves)
    logits = both.logits
    shown = [*both.values.values(), *([] if logits is None else [logits])]
    if any(len(value) != 2 for value in shown):
        return view.run(batch, names), view.run(batch, names, edits=edits)
    one, other = (
        replace(both.part(row), logits=None if logits is None else logits[row])
        for row in (slice(0, 1), slice(1, 2))
    )
    return one, other


def _second(edit: Edit, value: Tensor) -> Tensor:
    """Returns an activation of two rows, the second one edited."""
    return torch.cat([value[:1], edit(value[1:])])


def why_overflown(probe: Probe) -> str:
    """Returns why the model's own numbers are not finite, first of all where; empty: they are."""
    for name, value in probe.clean.values.items():
        if name.endswith("hook_attn_scores"):
            continue  # minus infinity where nothing is read
        if not bool(value.isfinite().all()):
            return why_not_finite(f"{name}, of four tokens", value.dtype)
    logits = probe.clean.logits
    if logits is not None and says_nothing(logits):
        return why_not_finite("the logits of four tokens", logits.dtype)
    return ""


def probe_batch(view: ModelView) -> Batch:
    """Returns four fixed tokens."""
    length = _LENGTH if view.n_ctx is None else min(_LENGTH, view.n_ctx)
    # Distinct tokens, past the special ones at the start of most vocabularies.
    start, step = (11, 7) if view.d_vocab > 11 + 7 * _LENGTH else (0, 1)
    ids = torch.tensor([[(start + step * index) % view.d_vocab for index in range(length)]])
    side = Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    decoder = None
    if view.encode_decoder is not None:
        first = torch.tensor([view.encode_decoder(None)[:1]])
        decoder_ids = torch.cat([first, ids.flip(1)[:, : length - 1]], dim=1)
        decoder = Side(ids=decoder_ids, mask=torch.ones_like(decoder_ids, dtype=torch.bool))
    return Batch(main=side, decoder=decoder)


def _zero_first(value: Tensor) -> Tensor:
    value = value.clone()
    value[:, 0] = 0
    return value


def _grid(pre: Tensor) -> Tensor:
    line = torch.linspace(-_GRID, _GRID, pre.numel(), device=pre.device, dtype=torch.float64)
    return line.to(pre.dtype).view_as(pre)


def settle_block(
    readings: Sequence[Block], probe: Probe, resid_out: str, host_activation: Activation | None
) -> tuple[Block, float]:
    """Returns the reading of a block that reproduces its output, with its activation.

    And its error, at the block's output and at what its neurons read: parallel and sequential
    blocks sum the same three tensors and differ only there. The error is infinite where weights
    and activations do not fit, or are not there.

    Args:
        readings: Possible placements of the block's norms.
        probe: The two passes.
        resid_out: Name of the block's output in the probe: the next block's input, or its own.
        host_activation: The host's own activation function, used if no named one matches.
    """
    block, error = _closest(readings, probe, resid_out)
    if error == float("inf"):
        return block, error  # there is nothing to settle
    block = replace(block, attentions=tuple(_settle_scales(block, probe)))
    ff, ending = block.feed_forward, block.ending
    if ending is not None:
        block = replace(block, ending=_settle_activation(ending, probe, None))
    if ff is None or ff.refusal or ff.routes:  # of experts the activation is known
        return block, error
    return replace(block, feed_forward=_settle_activation(ff, probe, host_activation)), error


def _closest(readings: Sequence[Block], probe: Probe, resid_out: str) -> tuple[Block, float]:
    """Returns the reading with the least error, or the first that rounding explains, and its error.

    All of its input is looked at only where the output and some neurons do not say already that it
    is wrong, or that another one is closer.
    """
    best, least = readings[0], float("inf")
    for reading in readings:
        error = _output_error(reading, probe, resid_out)
        if error < least and len(readings) > 1:
            error = max(error, _some_error(reading, probe))
        if error < least and (error <= probe.tolerance or len(readings) == 1):
            error = max(error, _input_error(reading, probe))
        if error < least:
            best, least = reading, error
        if least <= _ROUNDING * probe.tolerance:
            break
    return best, least


def _output_error(block: Block, probe: Probe, resid_out: str) -> float:
    return _error_of(lambda: [relative_error(block.output(probe.clean), probe.clean[resid_out])])


def _input_error(block: Block, probe: Probe) -> float:
    return _error_of(
        lambda: [
            error for ff in block.feed_forwards for _, error in pre_errors(block, ff, probe.clean)
        ]
    )


def _some_error(block: Block, probe: Probe) -> float:
    """Returns the error of a few neurons' input, which is that of all of them at least."""
    ff = block.feed_forward
    if ff is None or ff.routes or not ff.neurons_known:
        return 0.0

    def compare() -> list[float]:
        (weight, bias), *_ = ff.branches()
        bias, expected = None if bias is None else bias[:_FEW], probe.clean[ff.pre]
        found = affine(_read(block, ff, probe.clean), weight[:, :_FEW], bias)
        return [relative_error(found, expected[..., :_FEW], size=expected.abs().max())]

    return _error_of(compare)


def _error_of(compare: Callable[[], list[float]]) -> float:
    """Returns the largest of errors; infinite where what is compared cannot be computed."""
    try:
        errors = compare()
    except torch.OutOfMemoryError:
        raise
    except (LookupError, RuntimeError, UnsupportedModel):
        return float("inf")
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def _settle_scales(block: Block, probe: Probe) -> Iterator[AttentionSublayer]:
    """Yields the attention sublayers, cross-attention with the scale of its scores.

    It is 1 in T5 and 1 / sqrt(d_head) in BART, and no config field has it on every host; T5Gemma's
    module has a number of its own.
    """
    stream = probe.clean.resid_in(block)
    for attention in block.attentions:
        if attention.kind == "cross":
            key = probe.clean.key(attention)
            expected = probe.clean.pattern(attention).permute(0, 2, 1, 3)
            told = [] if attention.scale is None else [attention.scale]
            attention = replace(attention, scale=None)
            # Queries with adapters beside their weight: maps that hold the pattern need none.
            with contextlib.suppress(UnsupportedModel):
                for scale in (1.0, key.shape[-1] ** -0.5, *told):
                    tried = replace(attention, scale=scale)
                    found = cross_pattern(tried, stream, key, expected >= 0)
                    if relative_error(found, expected) <= probe.tolerance:
                        attention = tried
        yield attention
        stream = attention.join(stream, attention.raw_output(probe.clean))


def pre_errors(
    block: Block, ff: FeedForward, trace: Trace, real: Tensor | None = None
) -> Iterator[tuple[str, float]]:
    """Yields what is recomputed of what a feed-forward sublayer reads, and the error of each."""
    x = _read(block, ff, trace)
    key = ("reread", ff.read_names, ff.weights)
    read = ff.reread(x) if ff.routes else trace.once(key, x, lambda: [*ff.reread(x)])
    for label, name, found in read:
        yield label, relative_error(found, trace[name], real=real)


def _read(block: Block, ff: FeedForward, trace: Trace) -> Tensor:
    x = block.read_by(ff, trace)
    return x if ff.norm_in is None else ff.norm_in(x)


def _settle_activation(
    ff: FeedForward, probe: Probe, host_activation: Activation | None
) -> FeedForward:
    errors = _mean_errors(ff, probe.edited)
    best = ACTIVATIONS[errors.index(min(errors))]
    for option in (best, host_activation):
        if option is None:
            continue
        settled = replace(ff, activation=option)
        if activation_error(settled, probe.edited) <= probe.tolerance:
            return settled
    error = activation_error(replace(ff, activation=best), probe.edited)
    refusal = four_parts(
        "unknown feed-forward activation",
        f"a relative error of {error:.2g} for the closest, {best.name}",
        f"at most {probe.tolerance:.0e} for one of {[known.name for known in ACTIVATIONS]}",
        "Use 'attn_out', 'resid_mid' or 'mlp_in', which do not need it.",
    )
    return replace(ff, refusal=refusal)


def _mean_errors(ff: FeedForward, trace: Trace) -> list[float]:
    """Returns the mean error of each known activation, to rank similar ones in half precision.

    The largest error is rounding of the largest neuron, the same for gelu and gelu_new. Blocks
    whose neurons read the same grid share what the activations make of it.
    """

    def each(x: Tensor) -> Tensor:
        return trace.once(
            "activations", x, lambda: torch.cat([option(x) for option in ACTIVATIONS], dim=-2)
        )

    side_by_side = replace(ff.followed(trace), activation=Activation("each", each))
    posts = side_by_side.post_activation([trace[name].unsqueeze(-2) for name in ff.pre_names])
    errors = (posts - trace[ff.post].unsqueeze(-2)).abs().movedim(-2, 0).flatten(1).mean(1)
    return errors.nan_to_num(float("inf")).tolist()


def _post(ff: FeedForward, trace: Trace) -> Tensor:
    return ff.followed(trace).post_activation([trace[name] for name in ff.pre_names])


def activation_error(ff: FeedForward, trace: Trace, real: Tensor | None = None) -> float:
    """Returns the error of the neurons, or of experts' output, recomputed from their input."""
    if isinstance(ff, Experts):
        return relative_error(ff.raw_output(trace), trace[ff.written], real=real)
    return relative_error(_post(ff, trace), trace[ff.post], real=real)


def relative_error(
    value: Tensor, expected: Tensor, *, size: Tensor | None = None, real: Tensor | None = None
) -> float:
    """Returns the largest difference, relative to the largest expected entry.

    Args:
        value: Recomputed values.
        expected: The model's own.
        size: Divisor of each difference, instead.
        real: The positions [batch, pos] that count; None for all.
    """
    if value.shape != expected.shape:
        return float("nan")
    size = expected.abs().max() if size is None else size
    ratio = (value - expected).abs() / torch.where(size > 0, size, torch.ones_like(size))
    return float((ratio if real is None else ratio[real.to(ratio.device)]).max())
