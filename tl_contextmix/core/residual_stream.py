r"""The residual stream of a position as a sum of everything that was ever written to it.

.. math:: h = M_0(e) + \sum_l \big[ M^A_l(A_l) + M^F_l(F_l) \big]

with :math:`e` what enters the first block, :math:`A_l` and :math:`F_l` what the sublayers write,
biases included, and :math:`M` the norms that stand on the stream itself between a component and the
place where the stream is read, their scales frozen at the real values and their biases counted with
the sublayer whose sum they norm. In pre-LN models there are none and every :math:`M` is the
identity; in post-LN models (BERT, BART) :math:`M` holds a norm for every sublayer that follows. So
the parts add up exactly in either kind. A norm of a sublayer's output (Gemma 2) belongs to its
component, frozen likewise.

Each sublayer's output is itself a sum: of its heads, of what its heads read from each source, of
single neurons times their value vectors, and of its biases.

What hooks of the user's own add to the stream is a component of its own where they add it: in front
of a block, between its sublayers, or after them (``resid_pre steering``, ...). What they add to a
sublayer's output is the sublayer's.

Where a dictionary stands for a feed-forward sublayer, its features are that sublayer's neurons and
what they miss is a component (``mlp error``). Where it stands in the stream itself, they and
what they miss are where the sum starts, and nothing that was written before is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Sublayer, Trace, shift
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.opaque_feed_forward import OpaqueFeedForward
from tl_contextmix.core.token_sums import FrozenNorm, beside
from tl_contextmix.errors import UnsupportedModel

Kind = Literal[
    "embed",
    "attn",
    "cross_attn",
    "mixer",
    "mlp",
    "per_layer_embed",
    "resid_pre steering",
    "resid_mid steering",
    "resid_mid_cross steering",
    "resid_post steering",
    "mlp feature",
    "mlp error",
    "resid_pre feature",
    "resid_pre error",
    "resid_mid feature",
    "resid_mid error",
    "resid_mid_cross feature",
    "resid_mid_cross error",
    "resid_post feature",
    "resid_post error",
]
# Sublayers that are one component.
_WHOLE = ("mixer", "per_layer_embed")
_STEERING: dict[str, Kind] = {
    "attn": "resid_mid steering",
    "cross_attn": "resid_mid_cross steering",
}


@dataclass(frozen=True)
class Stop:
    """Where the stream is read, if not after the last block.

    Attributes:
        layer: Number of the block.
        sublayers: How many of its sublayers have written by then.
        normed: Whether the norm of the last one's sum is passed, too (post-LN).
    """

    layer: int
    sublayers: int
    normed: bool = True

    @classmethod
    def before(cls, block: Block, kind: str) -> Stop:
        """Returns where a sublayer reads; those of a parallel block read what enters it."""
        kinds = [one.removesuffix(" feature") for one, _ in _kinds(block)]
        return cls(block.layer, 0 if block.parallel else kinds.index(kind))


@dataclass(frozen=True)
class Neurons:
    """The neurons of a sublayer: numbers times vectors that no input changes.

    A feed-forward neuron is its activation times a row of W_out. An attention neuron is what a head
    reads from one source in one dimension, ``pattern * value``, times a row of W_O.

    Attributes:
        read: Returns the vectors, as the model holds them.
        activations: The numbers; one source where neurons have none (feed-forward).
        path: From the sublayer's output to where the stream is read.
        silent: Whether all numbers are zero: those of an expert that no sentence is routed to.
    """

    read: Callable[[], Float[Tensor, "neuron d_model"]]
    activations: Float[Tensor, "batch source neuron"]
    path: FrozenNorm
    silent: bool = False

    @property
    def coefficients(self) -> Float[Tensor, "batch source neuron"]:
        """Numbers that `vectors` are multiplied with where the stream is read."""
        return self.activations / self.path.scale[:, None]

    def vectors(self, index: Tensor | slice) -> Float[Tensor, "*some d_model"]:
        """Returns vectors of some neurons where the stream is read, still to be multiplied."""
        return self.path.unscaled(self.rows[index])

    @cached_property
    def rows(self) -> Float[Tensor, "neuron d_model"]:
        """The vectors, as the model holds them."""
        return self.read()

    @property
    def count(self) -> int:
        """How many they are."""
        return self.activations.shape[2]


@dataclass(frozen=True)
class Component:
    """Something that writes to the residual stream of one position in each sentence.

    Attributes:
        kind: What it is.
        layer: Number of its layer; -1 for what enters the first block.
        total: What it writes, biases included, where the stream is read.
        bias: The part of it that no head and no neuron writes.
    """

    kind: Kind
    layer: int
    total: Float[Tensor, "batch d_model"]
    bias: Float[Tensor, "batch d_model"]

    @property
    def whole(self) -> bool:
        """Whether it has no parts: what enters the first block, mixers, steering, and errors."""
        return self.kind in ("embed", *_WHOLE) or self.kind.endswith(("steering", "error"))

    def written(
        self, rows: slice = slice(None), some: Tensor | slice = slice(None)
    ) -> Float[Tensor, "batch one d_model"]:
        """Returns what it writes in some sentences, as its only part."""
        return self.total[rows, None][:, some]


@dataclass(frozen=True)
class AttentionComponent(Component):
    """An attention sublayer as a component.

    Attributes:
        weight: W_O.
        pattern: What the position attends to, times what hooks scaled heads with.
        mixed: What each head read, where hooks changed it; None for pattern times value.
        value: Value vectors of the sources, times the position's gate where there is one.
        read: Which sources can be read: no padding, and nothing that comes later in a causal model.
        path: From the sublayer's output to where the stream is read.
    """

    weight: Float[Tensor, "head d_head d_model"]
    pattern: Float[Tensor, "batch head source"]
    value: Float[Tensor, "batch source head d_head"]
    read: Bool[Tensor, "batch source"]
    path: FrozenNorm
    mixed: Float[Tensor, "batch head d_head"] | None = None

    def heads(
        self, rows: slice = slice(None), some: Tensor | slice = slice(None)
    ) -> Float[Tensor, "batch head d_model"]:
        """Returns what each head writes, in some sentences and of some heads."""
        if self.mixed is None:
            pattern, value = self.pattern[rows][:, some], self.value[rows][:, :, some]
            mixed = torch.einsum("bhs,bshd->bhd", pattern, value)
        else:
            mixed = self.mixed[rows][:, some]
        written = torch.einsum("bhd,hdm->bhm", mixed, self.weight[some])
        return self.path.part(rows).linear(written)

    def sources(
        self, rows: slice = slice(None), some: Tensor | slice = slice(None)
    ) -> Float[Tensor, "batch source d_model"]:
        """Returns what is read from each source, by all heads together."""
        pattern, value = self.pattern[rows][:, :, some], self.value[rows][:, some]
        read = torch.einsum("bhs,bshd->bshd", pattern, value)
        return self.path.part(rows).linear(read.flatten(2) @ self.weight.flatten(0, 1))

    def head_sources(
        self, head: int, rows: slice = slice(None), some: Tensor | slice = slice(None)
    ) -> Float[Tensor, "batch source d_model"]:
        """Returns what one head reads from each source: the value-output vectors."""
        read = self.pattern[rows, head, :, None][:, some] * self.value[rows, :, head][:, some]
        return self.path.part(rows).linear(read @ self.weight[head])

    def neurons(self) -> Neurons:
        """Returns its neurons, head by head."""
        read = torch.einsum("bhs,bshd->bshd", self.pattern, self.value)
        return Neurons(lambda: self.weight.flatten(0, 1), read.flatten(2), self.path)


@dataclass(frozen=True)
class FeedForwardComponent(Component):
    """A feed-forward sublayer as a component.

    Attributes:
        sublayer: The sublayer, with the routing of its experts held.
        post: What W_out multiplies, less the bias that is added there.
        path: From the sublayer's output to where the stream is read.
    """

    sublayer: FeedForward
    post: Float[Tensor, "batch neuron"]
    path: FrozenNorm

    def neurons(self) -> Iterator[tuple[int | None, Neurons]]:
        """Yields the neurons of each expert, with its number; all there are without experts.

        Of an expert that no sentence is routed to the vectors are not read.
        """
        for number, columns, vectors in self.sublayer.groups():
            silent = number is not None and self._silent(number)
            yield number, Neurons(vectors, self.post[:, None, columns], self.path, silent)

    def experts(
        self, rows: slice = slice(None), some: Tensor | slice = slice(None)
    ) -> Float[Tensor, "batch expert d_model"]:
        """Returns what the neurons of each expert write, in some sentences and of some experts."""
        each = list(self.sublayer.groups())
        if isinstance(some, Tensor):
            each = [each[number] for number in some.tolist()]
        written = []
        for number, columns, vectors in each:
            silent = number is not None and self._silent(number)
            nothing = torch.zeros_like(self.total[rows])
            written.append(nothing if silent else self.post[rows, columns] @ vectors())
        return self.path.part(rows).linear(torch.stack(written, dim=1))

    def _silent(self, expert: int) -> bool:
        """Whether no sentence is routed to an expert."""
        gain = self.sublayer.gain
        return gain is not None and not bool(gain[..., expert].any())


@dataclass(frozen=True)
class OpaqueComponent(Component):
    """A feed-forward sublayer whose neurons are not known.

    Attributes:
        refusal: Why they are not.
    """

    refusal: str


@dataclass(frozen=True)
class Stream:
    """The residual stream of one position in each sentence, by component.

    Attributes:
        stack: The stack it belongs to.
        rows: The position in each sentence.
        components: In the order they write; the first is what enters the first block.
    """

    stack: str
    rows: Int[Tensor, " batch"]
    components: tuple[Component, ...]

    @cached_property
    def states(self) -> Float[Tensor, "batch step d_model"]:
        """The stream before any component, after the first, ..., after the last."""
        # Not cumsum: on CUDA its sums have no fixed order.
        states = [*accumulate(component.total for component in self.components)]
        return torch.stack([torch.zeros_like(states[0]), *states], dim=1)

    @property
    def total(self) -> Float[Tensor, "batch d_model"]:
        """The stream itself, where it is read."""
        return self.states[:, -1]


@dataclass(frozen=True)
class _Step:
    """A sublayer at the positions that are looked at, before it is known what follows.

    Attributes:
        kind: Of the component.
        layer: Its layer.
        constant: What it adds whatever its parts are, before a norm of its output.
        added: What hooks added to its output after that norm, or None.
        steering: Kind of steering after it, and what was added to the stream; None without.
        missing: What the features of a dictionary miss, or None.
        parts: Of the component.
        raw: Its output before that norm.
        norm_out: That norm.
        norm_after: The norm of the sum.
    """

    kind: Kind
    layer: int
    constant: Tensor
    added: Tensor | None
    steering: tuple[Kind, Tensor] | None
    missing: Tensor | None
    parts: dict[str, Any]
    raw: Tensor
    norm_out: FrozenNorm
    norm_after: FrozenNorm


@dataclass(frozen=True)
class _Entry:
    """What hooks added to the stream in front of a block."""

    layer: int
    added: Tensor


def needed(block: Block) -> tuple[str, ...]:
    """Returns names of the activations that a stream needs besides those of maps."""
    return (block.resid_out, *(ff.post for ff in block.feed_forwards), *block.made())


def decompose_stream(
    view: ModelView,
    trace: Trace,
    stack: str,
    rows: Tensor,
    *,
    sentences: Tensor | None = None,
    stop: Stop | None = None,
) -> Stream:
    """Returns the residual stream of some positions as a sum.

    Args:
        view: The model.
        trace: A pass over all of its blocks in this stack, with what `needed` names.
        stack: ``"encoder"`` or ``"decoder"``.
        rows: The positions.
        sentences: The sentence of each; None: one in each sentence.
        stop: Where it is read; None for the readout, after the last block.

    Raises:
        UnsupportedModel: If the whole stream is not the model's own.

    Cost: ``2 L d (2 d + d_mlp)`` operations per position, and patterns times values.
    """
    every = view.stacks[stack]
    blocks = every if stop is None else every[: stop.layer + 1]
    each = torch.arange(len(rows)) if sentences is None else sentences
    whole = each.tolist() == [*range(len(trace.batch.main.ids))]
    each = each.to(view.device)
    rows = rows.to(view.device)
    x = trace.resid_in(blocks[0])[each, rows]
    start: Tensor | None = x
    steps: list[_Step | _Entry] = []
    for block in blocks:
        entered = _entering(block, blocks, trace, (each, rows))
        if entered is not None:
            start, x = (x - entered, x) if block is blocks[0] else (start, x + entered)
            steps.append(_Entry(block.layer, entered))
        written = None if stop is None or block.layer < stop.layer else stop.sublayers
        kinds = _kinds(block)[:written]
        for place in range(len(kinds) + 1):
            if block.rewrite is not None and block.rewrite.written == place:
                features, start = block.rewrite.features, None
                step, x = _step(
                    block, features, trace, (each, rows), torch.zeros_like(x), whole=whole
                )
                steps = [step]
            if place < len(kinds):
                step, x = _step(block, kinds[place][1], trace, (each, rows), x, whole=whole)
                steps.append(step)
    if stop is not None and not stop.normed and isinstance(step := steps[-1], _Step):
        steps[-1] = replace(step, norm_after=FrozenNorm.at(None, x))
    stream = Stream(stack, rows, tuple(_components(start, steps, x)))
    if stop is None or not stop.sublayers:
        name = blocks[-1].resid_out if stop is None else blocks[-1].resid_in
        _require_whole(view, trace[name][each, rows], stream.total)
    return stream


def _kinds(block: Block) -> list[tuple[Kind, Sublayer]]:
    return [(_kind(sublayer), sublayer) for sublayer in block.sublayers]


def _kind(sublayer: Sublayer) -> Kind:
    if isinstance(sublayer, FeedForward):
        return cast("Kind", sublayer.kind)
    if isinstance(sublayer, AttentionSublayer):
        return "attn" if sublayer.kind == "self" else "cross_attn"
    return "mixer"


def _entering(
    block: Block, blocks: Sequence[Block], trace: Trace, at: tuple[Tensor, Tensor]
) -> Tensor | None:
    """Returns what hooks added in front of a block; None for nothing."""
    if block is blocks[0]:
        added = trace.edit((block.resid_in,))
        return None if added is None else added[at]
    if not trace.edited:
        return None
    added = trace.resid_in(block)[at] - trace[blocks[block.layer - 1].resid_out][at]
    return added if bool(added.any()) else None


def _step(
    block: Block,
    sublayer: Sublayer,
    trace: Trace,
    at: tuple[Tensor, Tensor],
    x: Tensor,
    *,
    whole: bool,
) -> tuple[_Step, Tensor]:
    """Returns a sublayer's parts and the stream after it.

    Values are not copied where these are all sentences, each once (``whole``).
    """

    def edit(names: tuple[str, ...]) -> Tensor | None:
        added = trace.edit(names)
        return None if added is None else added[at]

    kind, missing, constant = _kind(sublayer), None, x.new_zeros(x.shape[1])
    parts: dict[str, Any] = {}
    if isinstance(sublayer, AttentionSublayer):
        pattern, gate = trace.mixing(sublayer)[at[0], :, at[1]], trace.gate(sublayer)
        value = trace.value(sublayer) if whole else trace.value(sublayer)[at[0]]
        parts = {
            "pattern": pattern,
            "value": value if gate is None else value * gate[at][:, None],
            "weight": sublayer.W_O,
            "read": _readable(sublayer, trace, at, pattern),
        }
        mixed = torch.einsum("bhs,bshd->bhd", parts["pattern"], parts["value"])
        if sublayer.mixed in trace.changed:
            parts["mixed"] = mixed = trace.mixed(sublayer)[at]
        raw = torch.einsum("bhd,hdm->bm", mixed, parts["weight"])
        constant = shift(constant, sublayer.b_O)
    elif isinstance(sublayer, FeedForward) and sublayer.neurons_known:
        held = sublayer.followed(trace, at)
        parts = {"post": sublayer.coefficients(trace, at), "sublayer": held}
        raw, constant = held.write(parts["post"]), held.constant()
        if sublayer.missing:
            missing = trace[sublayer.missing][at]
            raw = raw + missing
    else:
        raw = sublayer.raw_output(trace, at)
        if isinstance(sublayer, OpaqueFeedForward):
            parts = {"refusal": sublayer.refusal}
    constant = shift(constant, edit(sublayer.edits.raw))
    raw = raw + constant
    norm_out = FrozenNorm.at(sublayer.norm_out, raw)
    added, steered = edit(sublayer.edits.out), edit(sublayer.edits.stream)
    x = shift(shift(x + norm_out.affine(raw), added), steered)
    norm_after = FrozenNorm.at(sublayer.norm_after, x)
    last = sublayer is block.sublayers[-1]
    after = "resid_post steering" if last else _STEERING.get(kind, "resid_mid steering")
    steering = None if steered is None else (after, steered)
    step = _Step(
        kind, block.layer, constant, added, steering, missing, parts, raw, norm_out, norm_after
    )
    return step, norm_after.affine(x)


def _readable(
    sublayer: AttentionSublayer, trace: Trace, at: tuple[Tensor, Tensor], pattern: Tensor
) -> Bool[Tensor, "batch source"]:
    """Returns which sources can be read.

    Not simply those with a weight: weights of real tokens underflow.
    """
    cross = sublayer.kind == "cross"
    side = trace.batch.side("encoder" if cross else sublayer.stack)
    real = beside(pattern, side.mask)[at[0]]
    if not cross and sublayer.stack == "decoder":
        real = real & (torch.arange(real.shape[1], device=pattern.device) <= at[1][:, None])
    return real | (pattern != 0).any(dim=1)


def _components(start: Tensor | None, steps: list[_Step | _Entry], like: Tensor) -> list[Component]:
    """Returns the components; what follows each of them is known from the end."""
    path = FrozenNorm.at(None, like)
    found: list[Component] = []
    for step in reversed(steps):
        if isinstance(step, _Entry):
            entered = path.linear(step.added)
            nothing = torch.zeros_like(entered)
            found.append(Component("resid_pre steering", step.layer, entered, nothing))
            continue
        onto = step.norm_after.then(path)
        within = step.norm_out.then(onto)
        if step.steering is not None:
            steering, added = step.steering
            steered = onto.linear(added)
            found.append(Component(steering, step.layer, steered, torch.zeros_like(steered)))
        constant = shift(step.norm_out.affine(step.constant.expand_as(step.raw)), step.added)
        bias = path.linear(step.norm_after.affine(constant))
        parts = step.raw - step.constant
        if step.missing is not None:
            error, parts = within.linear(step.missing), parts - step.missing
            kind = cast("Kind", step.kind.replace("feature", "error"))
            found.append(Component(kind, step.layer, error, torch.zeros_like(error)))
        total = within.linear(parts) + bias
        found.append(_component(step, total, bias, within))
        path = onto
    if start is not None:
        found.append(Component("embed", -1, path.linear(start), torch.zeros_like(start)))
    return found[::-1]


def _component(step: _Step, total: Tensor, bias: Tensor, path: FrozenNorm) -> Component:
    if step.kind in _WHOLE:
        return Component(step.kind, step.layer, total, bias)
    if "refusal" in step.parts:
        return OpaqueComponent(step.kind, step.layer, total, bias, **step.parts)
    kind = AttentionComponent if "pattern" in step.parts else FeedForwardComponent
    return kind(step.kind, step.layer, total, bias, path=path, **step.parts)


def _require_whole(view: ModelView, expected: Tensor, found: Tensor) -> None:
    """Checks that nothing but the sublayers wrote to the stream."""
    size = expected.abs().amax(dim=-1)
    error = float(((found - expected).abs().amax(dim=-1) / size).max())
    if not error <= view.tolerance:
        raise UnsupportedModel(
            f"the residual stream of {view.name} is not the sum of what its sublayers write",
            f"a relative error of {error:.2g} where it is read",
            f"at most {view.tolerance:.0e}",
            "Take off hooks of your own that edit the stream between blocks.",
        )
