r"""Parts that travel through whole blocks: linear once scales, patterns and slopes are frozen.

With all of them at their real values, a block is an affine map of the residual stream. Its linear
part carries what each input token brought, :math:`x_i = \sum_k x_{i \leftarrow k} + b_i`, from
layer to layer; its constant part only ever meets the bias :math:`b_i`. Tokens do not interact, so
any few of them can be carried alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace
from tl_contextmix.core.token_sums import FrozenNorm, Norm

Parts = Float[Tensor, "batch target part d_model"]


def _pass(norm: FrozenNorm, parts: Parts, constant: bool) -> Parts:
    """Returns the parts after a norm; with its bias where ``constant``."""
    return (norm.affine if constant else norm.linear)(parts, axis=2)


@dataclass(frozen=True)
class FrozenAttention:
    """An attention sublayer with its pattern and the scales of its norms frozen.

    Attributes:
        sublayer: The sublayer.
        pattern: Its attention probabilities.
        norm_in: Norm before it. A cross-attention sublayer reads its values elsewhere.
        norm_out: Norm of its output.
        norm_after: Norm of the residual sum.
        value_scale: Scale of a norm between W_V and values, or None.
        gate: What multiplies what heads read, or None.
    """

    sublayer: AttentionSublayer
    pattern: Float[Tensor, "batch head target source"]
    norm_in: FrozenNorm
    norm_out: FrozenNorm
    norm_after: FrozenNorm
    value_scale: Float[Tensor, "batch source #head 1"] | None = None
    gate: Float[Tensor, "batch target head d_head"] | None = None

    def __call__(self, stream: Parts, memory: Tensor | None, constant: bool) -> Parts:
        """Returns the parts of the residual stream after the sublayer.

        Args:
            stream: Parts before it.
            memory: Parts of the encoder's output [batch source part d_model], for cross-attention;
                None for none.
            constant: Whether biases are added: the parts are then the bias, one of them.
        """
        cross = self.sublayer.kind == "cross"
        read = memory if cross else _pass(self.norm_in, stream, constant)
        if read is None:
            assert not constant
            return _pass(self.norm_after, stream, constant)
        return self.write(stream, self.mix(self.value(read, constant)), constant)

    def value(
        self, read: Parts, constant: bool = False
    ) -> Float[Tensor, "batch source part *head"]:
        """Returns the parts of its values, given those of what it reads."""
        value = torch.einsum("bskm,hmd->bskhd", read, self.sublayer.W_V)
        b_V = self.sublayer.weights("b_V")
        value = value + b_V if constant and b_V is not None else value
        return value if self.value_scale is None else value / self.value_scale[:, :, None]

    def mix(self, value: Tensor) -> Float[Tensor, "batch target part head d_head"]:
        """Returns the parts of what heads read, before a gate."""
        return torch.einsum("bhts,bskhd->btkhd", self.pattern, value)

    def write(self, stream: Parts, mixed: Tensor, constant: bool = False) -> Parts:
        """Returns the parts of the residual stream after it, given those of what heads read."""
        mixed = mixed if self.gate is None else mixed * self.gate[:, :, None]
        out = torch.einsum("btkhd,hdm->btkm", mixed, self.sublayer.W_O)
        b_O = self.sublayer.weights("b_O")
        out = out + b_O if constant and b_O is not None else out
        return _pass(self.norm_after, stream + _pass(self.norm_out, out, constant), constant)

    def at(self, rows: slice, seen: slice) -> FrozenAttention:
        """Returns the sublayer at some targets, which read some sources."""
        cross = self.sublayer.kind == "cross"
        seen = slice(None) if cross else seen
        return FrozenAttention(
            sublayer=self.sublayer,
            pattern=self.pattern[:, :, rows, seen],
            norm_in=self.norm_in.part(place=rows if cross else seen),
            norm_out=self.norm_out.part(place=rows),
            norm_after=self.norm_after.part(place=rows),
            value_scale=None if self.value_scale is None else self.value_scale[:, seen],
            gate=None if self.gate is None else self.gate[:, rows],
        )


@dataclass(frozen=True)
class FrozenFeedForward:
    """A feed-forward sublayer with one slope per neuron and its norms' scales frozen.

    Attributes:
        sublayer: The sublayer, with the routing of its experts held.
        slopes: For each branch what a share of its pre-activation is multiplied with.
        constant: What belongs to no token, before W_out's constants: the bias's neurons.
        norm_in: Norm before it.
        norm_out: Norm of its output.
        norm_after: Norm of the residual sum.
    """

    sublayer: FeedForward
    slopes: tuple[Float[Tensor, "batch target neuron"], ...]
    constant: Float[Tensor, "batch target neuron"]
    norm_in: FrozenNorm
    norm_out: FrozenNorm
    norm_after: FrozenNorm

    def __call__(self, stream: Parts, read: Parts, constant: bool) -> Parts:
        """Returns the parts of the residual stream after the sublayer.

        Args:
            stream: Parts it adds to.
            read: Parts it reads, before its norm.
            constant: Whether the parts are the bias.
        """
        ff = self.sublayer
        if constant:
            out = (ff.write(self.constant) + ff.constant())[:, :, None]
        else:
            entering = _pass(self.norm_in, read, False)
            out = ff.transmit(entering, self.slopes)
        return _pass(self.norm_after, stream + _pass(self.norm_out, out, constant), constant)

    def at(self, rows: slice) -> FrozenFeedForward:
        """Returns the sublayer at some targets."""
        slopes = tuple(slope[:, rows] for slope in self.slopes)
        norms = (self.norm_in, self.norm_out, self.norm_after)
        later = (norm.part(place=rows) for norm in norms)
        sublayer = self.sublayer.part((slice(None), rows))
        return FrozenFeedForward(sublayer, slopes, self.constant[:, rows], *later)


@dataclass(frozen=True)
class FrozenBlock:
    """A block as an affine map of the residual stream.

    Attributes:
        block: The block.
        attentions: Its attention sublayers.
        feed_forward: Its feed-forward sublayer, or None.
        rewrite: The features of a dictionary in its stream, or None.
    """

    block: Block
    attentions: tuple[FrozenAttention, ...]
    feed_forward: FrozenFeedForward | None
    rewrite: FrozenFeedForward | None = None

    def __call__(self, stream: Parts, memory: Tensor | None, constant: bool = False) -> Parts:
        """Returns the parts of the block's output; arguments as for `FrozenAttention`."""
        before = stream
        for attention in self.attentions:
            stream = attention(stream, memory, constant)
        if self.feed_forward is None:
            return stream
        read = before if self.block.parallel else stream
        return self.feed_forward(stream, read, constant)

    def since(self, first: int) -> FrozenBlock:
        """Returns the block at the targets from one on, which read no earlier ones."""
        if first == 0:
            return self
        rows = slice(first, None)
        attentions = tuple(one.at(rows, rows) for one in self.attentions)
        ff = self.feed_forward
        return FrozenBlock(self.block, attentions, None if ff is None else ff.at(rows))

    def triangle(self, parts: list[Parts], rows: list[slice]) -> list[Parts]:
        """Returns the parts of its output by stretches of targets, none of which reads later ones.

        A stretch has the parts of the tokens up to its last target alone, and all of them at once:
        half the work of a square.

        Args:
            parts: Parts of its input by stretch. Used up.
            rows: The stretches, one after another from the first target on.
        """
        before = parts[:] if self.block.parallel else parts
        for attention in self.attentions:
            own = [attention.at(stretch, stretch) for stretch in rows]
            values = [
                one.value(_pass(one.norm_in, some, False))
                for one, some in zip(own, parts, strict=True)
            ]
            for index, (one, some) in enumerate(zip(own, parts, strict=True)):
                mixed = torch.zeros_like(values[index])
                for seen, value in zip(rows[: index + 1], values, strict=False):
                    mixed[:, :, : seen.stop] += attention.at(rows[index], seen).mix(value)
                parts[index] = one.write(some, mixed)
        if self.feed_forward is None:
            return parts
        for index, stretch in enumerate(rows):
            found = self.feed_forward.at(stretch)(parts[index], before[index], False)
            parts[index] = found
        return parts


def causal(frozen: Sequence[FrozenBlock]) -> bool:
    """Returns whether no target reads a later one in any of some blocks."""
    own = [a.pattern for block in frozen for a in block.attentions if a.sublayer.kind == "self"]
    # What is read is asked, not how much: `estimate` has no numbers. Of all blocks at once, as a
    # GPU is waited for.
    later = [(pattern != 0).triu(1).any() for pattern in own]
    return not later or not bool(torch.stack([one.to(later[0].device) for one in later]).any())


def freeze(
    block: Block,
    trace: Trace,
    bias: Float[Tensor, "batch target d_model"],
    memory_bias: Float[Tensor, "batch source d_model"] | None,
    fixed: bool,
) -> tuple[FrozenBlock, Float[Tensor, "batch target d_model"]]:
    """Returns a block frozen at a forward pass, and the bias after it.

    Args:
        block: The block.
        trace: The pass.
        bias: What belongs to no token in the block's input.
        memory_bias: The same of the encoder's output, where the block reads it.
        fixed: Whether feed-forward paths start from the bias alone rather than from zero.

    Raises:
        UnsupportedModel: If it mixes tokens in another way than by attention, or has a third
            sublayer.
    """
    block.require_attention()
    block.require_no_ending()
    stream, parts = trace.resid_in(block), bias[:, :, None]
    memory = None if memory_bias is None else memory_bias[:, :, None]
    attentions, streams = [], [stream]
    for sublayer in block.attentions:
        frozen = _freeze_attention(sublayer, trace, stream)
        attentions.append(frozen)
        parts = frozen(parts, memory, constant=True)
        stream = stream + sublayer.output(trace)
        stream = stream if sublayer.norm_after is None else sublayer.norm_after(stream)
        streams.append(stream)
    ff = None
    if block.feed_forward is not None:
        read, own = (streams[0], bias) if block.parallel else (stream, parts[:, :, 0])
        held = block.feed_forward.followed(trace)
        ff = _freeze_feed_forward(held, trace, stream, read, own, fixed)
        parts = ff(parts, own[:, :, None], constant=True)
    features = None
    if block.rewrite is not None:
        streams.append(trace[block.resid_out])
        read = streams[block.rewrite.written]
        none = torch.zeros_like(read)
        features = _freeze_feed_forward(block.rewrite.features, trace, none, read, none, fixed)
    return FrozenBlock(block, tuple(attentions), ff, features), parts[:, :, 0]


def _freeze_attention(sublayer: AttentionSublayer, trace: Trace, stream: Tensor) -> FrozenAttention:
    sublayer.require_own_values()
    raw, norm_in = sublayer.raw_output(trace), FrozenNorm.at(sublayer.norm_in, stream)
    return FrozenAttention(
        sublayer=sublayer,
        pattern=trace.mixing(sublayer),
        norm_in=norm_in,
        norm_out=FrozenNorm.at(sublayer.norm_out, raw),
        norm_after=FrozenNorm.at(sublayer.norm_after, stream + sublayer.output(trace)),
        value_scale=sublayer.value_scale(norm_in.affine(stream)),
        gate=trace.gate(sublayer),
    )


def _freeze_feed_forward(
    ff: FeedForward, trace: Trace, stream: Tensor, read: Tensor, bias: Tensor, fixed: bool
) -> FrozenFeedForward:
    norm_in = FrozenNorm.at(ff.norm_in, read)
    total = ff.pre_activations(read if ff.norm_in is None else ff.norm_in(read))
    # Which features pass is decided by a hair: by those of the pass, not by rounding.
    total = [trace[ff.pre]] if ff.missing else total
    slopes, constant = ff.linearise(ff.pre_activations(norm_in.affine(bias)), total, fixed)
    out = ff.write(ff.activate(total)) + ff.constant()
    out = out + trace[ff.missing] if ff.missing else out
    norm_out = FrozenNorm.at(ff.norm_out, out)
    return FrozenFeedForward(
        sublayer=ff,
        slopes=slopes,
        constant=constant,
        norm_in=norm_in,
        norm_out=norm_out,
        norm_after=FrozenNorm.at(ff.norm_after, stream + norm_out.affine(out)),
    )


@dataclass(frozen=True)
class FrozenStack:
    """The blocks of a stack as affine maps, and the bias after each.

    Attributes:
        blocks: The blocks.
        biases: What belongs to no token after each block.
        final_norm: Norm after the last one, where another stack reads its output.
    """

    blocks: tuple[FrozenBlock, ...]
    biases: tuple[Float[Tensor, "batch target d_model"], ...]
    final_norm: FrozenNorm

    def memory_bias(self) -> Float[Tensor, "batch target d_model"]:
        """Returns what belongs to no token in the output that another stack reads."""
        return _pass(self.final_norm, self.biases[-1][:, :, None], True)[:, :, 0]

    def memory(self, parts: Parts) -> Parts:
        """Returns the parts of the output that another stack reads, given those of its input."""
        for block in self.blocks:
            parts = block(parts, None)
        return _pass(self.final_norm, parts, False)


def freeze_stack(
    blocks: tuple[Block, ...],
    trace: Trace,
    fixed: bool,
    encoder: FrozenStack | None = None,
    final_norm: Norm | None = None,
) -> FrozenStack:
    """Returns a stack frozen at a forward pass.

    Args:
        blocks: Its blocks, from the first on.
        trace: The pass.
        fixed: See `freeze`.
        encoder: The stack whose output its cross-attention reads, or None.
        final_norm: Norm after the last block, or None.
    """
    bias = torch.zeros_like(trace.resid_in(blocks[0]))
    memory_bias = None if encoder is None else encoder.memory_bias()
    frozen, biases = [], []
    for block in blocks:
        if trace.edited and block.layer:
            # What hooks added between blocks is no token's; exactly zero without.
            bias = bias + (trace.resid_in(block) - trace[blocks[block.layer - 1].resid_out])
        one, bias = freeze(block, trace, bias, memory_bias, fixed)
        frozen.append(one)
        biases.append(bias)
    whole = bias if final_norm is None else trace[blocks[-1].resid_out]
    return FrozenStack(tuple(frozen), tuple(biases), FrozenNorm.at(final_norm, whole))


def own_parts(
    x: Float[Tensor, "batch pos d_model"], sources: slice, targets: slice = slice(None)
) -> Parts:
    """Returns the input of the first block as parts: each token its own, for some tokens.

    Args:
        x: The input.
        sources: The tokens.
        targets: Positions to return.
    """
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[targets, sources]
    return einsum(x[:, targets], eye, "batch pos d_model, pos part -> batch pos part d_model")
