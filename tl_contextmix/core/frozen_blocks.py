r"""Parts that travel through whole blocks: linear once scales, patterns and slopes are frozen.

With all of them at their real values, a block is an affine map of the residual stream. Its linear
part carries what each input token brought, :math:`x_i = \sum_k x_{i \leftarrow k} + b_i`, from
layer to layer; its constant part only ever meets the bias :math:`b_i`. Tokens do not interact, so
any few of them can be carried alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace
from tl_contextmix.core.token_sums import FrozenNorm, Norm

Parts = Float[Tensor, "batch target part d_model"]
# Each of its own length.
Stretches = list[Float[Tensor, "batch _ _ d_model"]]


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
        lender: The earlier sublayer whose values it uses, where they are not its own; else None.
    """

    sublayer: AttentionSublayer
    pattern: Float[Tensor, "batch head target source"]
    norm_in: FrozenNorm
    norm_out: FrozenNorm
    norm_after: FrozenNorm
    value_scale: Float[Tensor, "batch source #head 1"] | None = None
    gate: Float[Tensor, "batch target head d_head"] | None = None
    lender: FrozenAttention | None = None

    @property
    def reader(self) -> FrozenAttention:
        """The sublayer that makes the values: itself, or the one whose values it uses."""
        return self.lender or self

    def __call__(
        self, stream: Parts, memory: Tensor | None, constant: bool, lent: Parts | None = None
    ) -> Parts:
        """Returns the parts of the residual stream after the sublayer.

        Args:
            stream: Parts before it.
            memory: Parts of the encoder's output [batch source part d_model], for cross-attention;
                None for none.
            constant: Whether biases are added: the parts are then the bias, one of them.
            lent: Parts before the sublayer whose values it uses, where they are not its own.
        """
        cross, reader = self.sublayer.kind == "cross", self.reader
        read = (
            memory if cross else _pass(reader.norm_in, stream if lent is None else lent, constant)
        )
        if read is None:
            assert not constant
            return _pass(self.norm_after, stream, constant)
        return self.write(stream, self.mix(reader.value(read, constant)), constant)

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
            lender=None if self.lender is None else self.lender.at(seen, seen),
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
        return _pass(self.norm_after, stream + self.adds(read, constant), constant)

    def adds(self, read: Parts, constant: bool) -> Parts:
        """Returns the parts of what it adds to the residual stream."""
        ff = self.sublayer
        if constant:
            out = (ff.write(self.constant) + ff.constant())[:, :, None]
        else:
            out = ff.transmit(_pass(self.norm_in, read, False), self.slopes)
        return _pass(self.norm_out, out, constant)

    def part(self, batch: slice = slice(None), place: slice = slice(None)) -> FrozenFeedForward:
        """Returns the sublayer at some rows of the batch and some targets."""
        slopes = tuple(slope[batch, place] for slope in self.slopes)
        norms = (self.norm_in, self.norm_out, self.norm_after)
        later = (norm.part(batch, place) for norm in norms)
        sublayer = self.sublayer.part((batch, place))
        return FrozenFeedForward(sublayer, slopes, self.constant[batch, place], *later)


@dataclass(frozen=True)
class FrozenBlock:
    """A block as an affine map of the residual stream.

    Attributes:
        block: The block.
        attentions: Its attention sublayers.
        feed_forward: Its feed-forward sublayer, or None.
        rewrite: The features of a dictionary in its stream, or None.
        ending: A third sublayer, or None.
        lends: Whether later blocks use its values.
    """

    block: Block
    attentions: tuple[FrozenAttention, ...]
    feed_forward: FrozenFeedForward | None
    rewrite: FrozenFeedForward | None = None
    ending: FrozenFeedForward | None = None
    lends: bool = False

    def __call__(self, stream: Parts, memory: Tensor | None, entered: dict[int, Parts]) -> Parts:
        """Returns the parts of the block's output.

        Args:
            stream: Parts of its input.
            memory: As for `FrozenAttention`.
            entered: Parts of the inputs of earlier blocks whose values are used again, by layer;
                those of this one are added.
        """
        before = stream
        if self.lends:
            entered[self.block.layer] = stream
        for attention in self.attentions:
            lender = attention.sublayer.lender
            lent = None if lender is None else entered[lender]
            stream = attention(stream, memory, False, lent)
        if self.feed_forward is not None:
            read = before if self.block.parallel else stream
            stream = self.feed_forward(stream, read, False)
        return stream if self.ending is None else self.ending(stream, stream, False)

    def since(self, first: int) -> FrozenBlock:
        """Returns the block at the targets from one on, which read no earlier ones."""
        if first == 0:
            return self
        later = slice(first, None)
        ff, ending = (
            None if one is None else one.part(place=later)
            for one in (self.feed_forward, self.ending)
        )
        attentions = tuple(one.at(later, later) for one in self.attentions)
        return FrozenBlock(self.block, attentions, ff, ending=ending, lends=self.lends)

    def triangle(
        self, parts: Stretches, rows: list[slice], entered: dict[int, Stretches]
    ) -> Stretches:
        """Returns the parts of its output by stretches of targets, none of which reads later ones.

        A stretch has the parts of the tokens up to its last target alone, and all of them at once:
        half the work of a square.

        Args:
            parts: Parts of its input by stretch. Used up.
            rows: The stretches, one after another from the first target on.
            entered: As for a call, by stretch.
        """
        before = parts[:] if self.block.parallel else parts
        if self.lends:
            entered[self.block.layer] = parts[:]
        for attention in self.attentions:
            lender = attention.sublayer.lender
            readers = (attention.reader.at(stretch, stretch) for stretch in rows)
            values = [
                one.value(_pass(one.norm_in, some, False))
                for one, some in zip(
                    readers, parts if lender is None else entered[lender], strict=True
                )
            ]
            for index, stretch in enumerate(rows):
                mixed = torch.zeros_like(values[index])
                for seen, value in zip(rows[: index + 1], values, strict=False):
                    mixed[:, :, : seen.stop] += attention.at(stretch, seen).mix(value)
                parts[index] = attention.at(stretch, stretch).write(parts[index], mixed)
        for index, stretch in enumerate(rows):
            if self.feed_forward is not None:
                ff = self.feed_forward.part(place=stretch)
                parts[index] = ff(parts[index], before[index], False)
            if self.ending is not None:
                ending = self.ending.part(place=stretch)
                parts[index] = ending(parts[index], parts[index], False)
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
    lent: tuple[FrozenAttention, Float[Tensor, "batch source d_model"]] | None = None,
) -> tuple[FrozenBlock, Float[Tensor, "batch target d_model"]]:
    """Returns a block frozen at a forward pass, and the bias after it.

    Args:
        block: The block.
        trace: The pass.
        bias: What belongs to no token in the block's input.
        memory_bias: The same of the encoder's output, where the block reads it.
        fixed: Whether feed-forward paths start from the bias alone rather than from zero.
        lent: The earlier attention sublayer whose values it uses, and what belongs to no token in
            the input of that one's block; None where values are its own.

    Raises:
        UnsupportedModel: If it mixes tokens in another way than by attention.
    """
    block.require_attention()
    stream, parts = trace.resid_in(block), bias[:, :, None]
    memory = None if memory_bias is None else memory_bias[:, :, None]
    attentions, streams = [], [stream]
    for sublayer in block.attentions:
        lender, read = (None, None) if lent is None else (lent[0], lent[1][:, :, None])
        raw = sublayer.raw_output(trace)
        after = stream + sublayer.output(trace, raw=raw)
        norm_in = FrozenNorm.at(sublayer.norm_in, stream)
        frozen = FrozenAttention(
            sublayer=sublayer,
            pattern=trace.mixing(sublayer),
            norm_in=norm_in,
            norm_out=FrozenNorm.at(sublayer.norm_out, raw),
            norm_after=FrozenNorm.at(sublayer.norm_after, after),
            value_scale=None if lender else sublayer.value_scale(norm_in.affine(stream)),
            gate=trace.gate(sublayer),
            lender=lender,
        )
        attentions.append(frozen)
        parts = frozen(parts, memory, constant=True, lent=read)
        stream = after
        stream = stream if sublayer.norm_after is None else sublayer.norm_after(stream)
        streams.append(stream)
    ff = ending = None
    if block.feed_forward is not None:
        read, own = (streams[0], bias) if block.parallel else (stream, parts[:, :, 0])
        held = block.feed_forward.followed(trace)
        ff = freeze_feed_forward(held, stream, read, own, fixed, trace)
        parts = ff(parts, own[:, :, None], constant=True)
        stream = stream if block.ending is None else stream + held(read)
    if block.ending is not None:
        own = parts[:, :, 0]
        ending = freeze_feed_forward(block.ending.followed(trace), stream, stream, own, fixed)
        parts = ending(parts, parts, constant=True)
    features = None
    if block.rewrite is not None:
        streams.append(trace[block.resid_out])
        read = streams[block.rewrite.written]
        none = torch.zeros_like(read)
        features = freeze_feed_forward(block.rewrite.features, none, read, none, fixed, trace)
    return FrozenBlock(block, tuple(attentions), ff, features, ending), parts[:, :, 0]


def freeze_feed_forward(
    ff: FeedForward,
    stream: Float[Tensor, "batch target d_model"],
    read: Float[Tensor, "batch target d_model"],
    bias: Float[Tensor, "batch target d_model"],
    fixed: bool,
    trace: Trace | None = None,
) -> FrozenFeedForward:
    """Returns a feed-forward sublayer with its slopes and its norms' scales frozen.

    Args:
        ff: The sublayer, with the routing of its experts held.
        stream: The residual stream that it adds to.
        read: The residual stream that it reads.
        bias: What belongs to no token in what it reads.
        fixed: See `freeze`.
        trace: The pass, of which the features of a dictionary are read.
    """
    norm_in = FrozenNorm.at(ff.norm_in, read)
    total = ff.pre_activations(read if ff.norm_in is None else ff.norm_in(read))
    # Which features pass is decided by a hair: by those of the pass, not by rounding.
    total = [trace[ff.pre]] if ff.missing and trace is not None else total
    slopes, constant = ff.linearise(ff.pre_activations(norm_in.affine(bias)), total, fixed)
    out = stream
    if ff.norm_out is not None or ff.norm_after is not None:  # no scale depends on it elsewhere
        out = ff.write(ff.activate(total)) + ff.constant()
        out = out + trace[ff.missing] if ff.missing and trace is not None else out
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
        """Returns the parts of the output that another stack reads, given the first block's."""
        entered: dict[int, Parts] = {}
        for block in self.blocks[1:]:
            parts = block(parts, None, entered)
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
    frozen, biases, entering = [], [], []
    lenders = {attention.lender for block in blocks for attention in block.attentions}
    for block in blocks:
        if trace.edited and block.layer:
            # What hooks added between blocks is no token's; exactly zero without.
            bias = bias + (trace.resid_in(block) - trace[blocks[block.layer - 1].resid_out])
        entering.append(bias)
        lender = next((a.lender for a in block.attentions if a.lender is not None), None)
        lent = None if lender is None else (frozen[lender].attentions[0], entering[lender])
        one, bias = freeze(block, trace, bias, memory_bias, fixed, lent)
        frozen.append(replace(one, lends=block.layer in lenders))
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
