"""One shape for every transformer block: its sublayers, and the activations of a pass.

Blocks hold no activations and copy no weights: weights are read from the model each time they are
used, in the dtype of the maths. Nothing here knows a host, or how a model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.activations import Activation, gated_slopes
from tl_contextmix.core.attention_terms import GatedTerm
from tl_contextmix.core.neuron_routes import transmit
from tl_contextmix.core.score_forms import HeadNorm
from tl_contextmix.core.token_sums import (
    AttentionTerm,
    Norm,
    beside,
    ends_of,
    multiply,
    through_neurons,
)
from tl_contextmix.errors import UnsupportedModel

FOLD_BYTES = 2**28
"""Memory for products of weights that are kept with a view, in all."""
Weights = Callable[[str], Tensor | None]
Identity = Literal[
    "pattern", "z", "mixing", "attn", "read", "activation", "mlp", "block", "unsteered"
]
"""What a method may need of a block in a pass that hooks edited.

``pattern``: the patterns are those that the host mixed values with. ``z``: heads are pattern times
value. ``mixing``: so they are up to a factor of each head and target. ``attn``, ``mlp``: what a
sublayer writes is what its heads, or its neurons, write. ``read``: the feed-forward sublayer reads
the stream. ``activation``: neurons are the activation of their input. ``block``: the block's output
is the sum of its input, its sublayers' outputs and steering. ``unsteered``: nothing else was added
to the stream inside of it.
"""
IDENTITIES: frozenset[Identity] = frozenset(get_args(Identity))


@dataclass(frozen=True)
class EditPoints:
    """Names of hook points after a sublayer, by what an edit there changes.

    Attributes:
        raw: The sublayer's output before a norm of it.
        out: What is added to the residual stream.
        stream: The residual sum, before a norm of it (post-LN).
    """

    raw: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """What all sublayers of a block have.

    Attributes:
        norm_in: Norm before it (pre-LN), or None.
        norm_out: Norm of its output before the residual sum (sandwich), or None.
        norm_after: Norm of the residual sum (post-LN), or None.
        edits: Where hooks may edit what it writes.
    """

    norm_in: Norm | None = None
    norm_out: Norm | None = None
    norm_after: Norm | None = None
    edits: EditPoints = EditPoints()

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what it computes in a pass at some places, before a norm of that."""
        raise NotImplementedError

    def output(
        self, trace: Trace, where: Any = slice(None), raw: Tensor | None = None
    ) -> Float[Tensor, "*some d_model"]:
        """Returns what it adds to the residual stream at some places, edits included.

        Args:
            trace: The pass.
            where: The places.
            raw: What it computes there, where that is known already.
        """
        out = self.raw_output(trace, where) if raw is None else raw
        out = out if self.norm_out is None else self.norm_out(out)
        added = trace.edit(self.edits.out)
        return shift(out, None if added is None else added[where])


@dataclass(frozen=True)
class ValueNorm:
    """An RMSNorm between the normed stream and the values; its gain is in W_V.

    Attributes:
        read: Returns what is normed, given the normed stream: of each head, or of all of them.
        norm: The norm.
    """

    read: Callable[[Tensor], Float[Tensor, "*place #head width"]] = field(repr=False)
    norm: Norm

    def scale(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place #head 1"]:
        """Returns its divisor."""
        return self.norm.scale(self.read(x))


@dataclass(frozen=True)
class AttentionSublayer(Sublayer):
    """One attention sublayer of a block.

    Attributes:
        stack: The stack whose positions it writes.
        kind: Whether it reads its own stack or the encoder.
        pattern: Name of the attention probabilities.
        value: Name of the value vectors, value bias included.
        mixed: Name of the pattern-weighted values, before W_O.
        key: Name of the keys.
        weights: Reads ``W_Q b_Q W_K b_K W_V b_V W_O b_O``.
        scale: What scores are multiplied with (cross-attention), or None where it is not known.
        window: How many tokens it reads at most, its own included, by the host's config; or None.
        value_norm: Norm between W_V and the values, or None.
        sink_scores: Name of the scores, where the softmax over them has one more logit per head
            (the weight ``sinks``) of which nothing is read; or an empty string.
        gate: Name of the gate whose sigmoid multiplies what heads read, or an empty string.
        lender: The layer whose keys and values it uses, where they are not its own; else None.
        query: Name of the queries.
        scores: Name of what may be the scores before the softmax, or an empty string.
        soft_cap: Soft cap of the scores, or None.
        query_norm: Norm of the queries before they are turned by positions, or None.
        key_norm: The same of the keys.
        divisors: Returns what divides queries, and keys, of a normed stream, each [d_head]; None
            for nothing. Those of latent attention come out of compressed streams, which are normed,
            and are shown after they are turned.
    """

    stack: str
    kind: Literal["self", "cross"]
    pattern: str
    value: str
    mixed: str
    key: str
    weights: Weights = field(repr=False)
    scale: float | None = None
    window: int | None = None
    value_norm: ValueNorm | None = None
    sink_scores: str = ""
    gate: str = ""
    lender: int | None = None
    query: str = ""
    scores: str = ""
    soft_cap: float | None = None
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    divisors: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = field(
        default=None, repr=False
    )

    def require_own_values(self) -> None:
        """Checks that its keys and values are made of what it reads.

        Raises:
            UnsupportedModel: If they are an earlier layer's.
        """
        if self.lender is not None:
            raise UnsupportedModel(
                f"what the values of {self.pattern.rpartition('.')[0]} read is not in its "
                "own layer",
                f"keys and values of layer {self.lender}",
                "values of the stream that enters the layer",
                "Ask about layers with values of their own, or for maps, attention, flow, "
                "gradients or log_prob_contributions.",
            )

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights per query head: ``v = (x W_V + b_V) / value_scale(x)``."""
        self.require_own_values()
        return require_weight(self.weights, "W_V")

    def value_scale(
        self, x: Float[Tensor, "*place d_model"]
    ) -> Float[Tensor, "*place #head 1"] | None:
        """Returns what divides the values of a (normed) stream: a norm between W_V and values."""
        return None if self.value_norm is None else self.value_norm.scale(x)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights per query head."""
        return require_weight(self.weights, "W_O")

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        """Output bias, or None."""
        return self.weights("b_O")

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what it computes in a pass at some places, edits before a norm of it included."""
        axes = "... head d_head, head d_head d_model -> ... d_model"
        mixed = trace.mixed(self)[where]
        key = (self.mixed, self.weights)
        out = trace.once(key, mixed, lambda: einsum(mixed, self.W_O, axes))
        edit = trace.edit(self.edits.raw)
        return shift(shift(out, self.b_O), None if edit is None else edit[where])

    def term(self, trace: Trace, rows: slice | list[int] = slice(None)) -> AttentionTerm:
        """Returns what it writes at some targets of a pass, before a norm of its output."""
        pattern, gate = trace.mixing(self)[:, :, rows], trace.gate(self)
        scale = pattern.new_ones(pattern.shape[0], pattern.shape[2], 1)
        span = trace.spans.get(self.pattern)
        span = None if span is None else span[:, :, rows]
        value, W_O = trace.value(self), self.W_O
        if gate is None:
            return AttentionTerm(pattern, value, W_O, scale, span=span)
        return GatedTerm(pattern, value, W_O, scale, span=span, gate=gate[:, rows])

    def join(
        self, stream: Float[Tensor, "*batch target d_model"], raw: Tensor
    ) -> Float[Tensor, "*batch target d_model"]:
        """Returns the residual stream after the sublayer, given `raw_output`."""
        stream = stream + (raw if self.norm_out is None else self.norm_out(raw))
        return stream if self.norm_after is None else self.norm_after(stream)


@dataclass(frozen=True)
class Mixer(Sublayer):
    """A sublayer that mixes tokens without attention weights: linear attention, a state space.

    It reads what attention reads, and is one component of the stream: what it puts out.

    Attributes:
        out: Name of what it puts out.
        refusal: Why there is no map of it.
        d_model: Width of its output.
    """

    out: str
    refusal: str
    d_model: int

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what it put out in a pass, before a norm of that."""
        return trace[self.out][where]


@dataclass(frozen=True)
class FeedForward(Sublayer):
    """The feed-forward sublayer: ``g(x W_in + b_in) W_out + b_out``, or gated.

    Gated: ``(g(x W_gate + b_gate) * (x W_in + b_in) + b_post) W_out + b_out``.

    Attributes:
        pre: Name of the activation's input (the gate branch where gated).
        post: Name of what W_out multiplies.
        pre_linear: Name of the linear branch, or None where not gated.
        weights: Reads ``W_in b_in W_gate b_gate b_post W_out b_out``.
        activation: The elementwise activation, or None where it is not one.
        refusal: Why the feed-forward block cannot be decomposed; empty where it can.
        point: Where a dictionary stands (``"mlp"``, ``"resid_pre"``, ...) whose features the
            neurons are; empty for the model's own neurons.
        missing: Name of what the features miss of the model's own output, added in front of a norm
            of it; empty for nothing.
        gain: What the coefficients of each place are multiplied with (a router's weight), or None;
            one number per place, or one per neuron.
        scales_input: Whether the gain is on the pre-activations instead (Llama 4).
        bounds: Between which the linear branch is cut off (gpt-oss), or None.
        routes: Whether there are experts, some of which each token goes through, see `Experts`.
        neurons_known: Whether it is taken apart into neurons.
    """

    pre: str
    post: str
    pre_linear: str | None
    weights: Weights = field(repr=False)
    activation: Activation | None = None
    refusal: str = ""
    gain: Tensor | None = field(default=None, repr=False, compare=False)
    scales_input: bool = False
    bounds: tuple[float, float] | None = None
    point: str = ""
    missing: str = ""
    routes: ClassVar[bool] = False
    neurons_known: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """What it is among the components of the stream."""
        return f"{self.point} feature" if self.point else "mlp"

    @property
    def held_names(self) -> tuple[str, ...]:
        """Names of the activations that `followed` reads."""
        return ()

    @property
    def busy(self) -> int:
        """How many of them a token uses at most."""
        return self.width

    def holding(self, x: Tensor) -> FeedForward:
        """Returns the sublayer with a routing held: that of its inputs, if none is yet."""
        del x
        return self

    def part(self, place: Any) -> FeedForward:
        """Returns the sublayer at some of the places whose routing is held."""
        return self if self.gain is None else replace(self, gain=self.gain[place])

    @property
    def gated(self) -> bool:
        """Whether there are two branches."""
        return self.pre_linear is not None

    @property
    def silent(self) -> bool:
        """Whether neurons can have slopes of exactly zero."""
        return self.activation is not None and self.activation.silent

    @property
    def pre_names(self) -> tuple[str, ...]:
        """Names of the branches' pre-activations, in the order of `branches`."""
        return (self.pre,) if self.pre_linear is None else (self.pre, self.pre_linear)

    @property
    def read_names(self) -> tuple[str, ...]:
        """Names of the activations that tell what the sublayer reads, as `reread` has them."""
        return self.pre_names

    @property
    def width(self) -> int:
        """How many neurons there are."""
        return len(self.W_out)

    def require_neurons(self) -> None:
        """Checks that it is taken apart into neurons.

        Raises:
            UnsupportedModel: If it is not.
        """
        if not self.neurons_known:
            raise UnsupportedModel(self.refusal)

    def shown(self) -> tuple[str, ...]:
        """Returns the names of the activations that tell whether it is read right."""
        return tuple(dict.fromkeys((*self.read_names, self.post)))

    def branches(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Returns weight and bias of the activated branch and, where gated, of the linear one."""
        linear = (require_weight(self.weights, "W_in"), self.weights("b_in"))
        if not self.gated:
            return (linear,)
        return ((require_weight(self.weights, "W_gate"), self.weights("b_gate")), linear)

    @property
    def W_out(self) -> Float[Tensor, "neuron d_model"]:
        """Output weights: one value vector per neuron."""
        return require_weight(self.weights, "W_out")

    def require_activation(self) -> Activation:
        """Returns the activation.

        Raises:
            UnsupportedModel: If it does not act on each unit alone.
        """
        if self.activation is None:
            raise UnsupportedModel(self.refusal)
        return self.activation

    def constant(self) -> Float[Tensor, " d_model"]:
        """Returns what the sublayer adds whatever its neurons do: b_out and b_post's image."""
        W_out = self.W_out
        total = W_out.new_zeros(W_out.shape[1])
        for name, matrix in (("b_out", None), ("b_post", W_out)):
            bias = self.weights(name)
            if bias is not None:
                bias = bias if matrix is None else bias @ matrix
                total = total + (bias if self.gain is None else bias * self.gain)
        return total

    def pre_activations(self, x: Tensor) -> list[Tensor]:
        """Returns what the branches compute of the sublayer's (normed) input."""
        return [affine(x, weight, bias) for weight, bias in self.branches()]

    def reread(self, x: Float[Tensor, "*some d_model"]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields what can be computed of the sublayer's (normed) input, each with its hook point.

        First what it is called, then the name of the model's own.
        """
        for name, pre in zip(self.pre_names, self.pre_activations(x), strict=True):
            label = "linear branch" if name == self.pre_linear else "pre-activation"
            yield f"recomputed {label}", name, pre

    def __call__(self, stream: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Returns what the sublayer adds to the residual stream, given what it reads of it."""
        x = stream if self.norm_in is None else self.norm_in(stream)
        return self.project(self.post_activation(self.pre_activations(x)))

    def activate(self, pre: Sequence[Tensor]) -> Tensor:
        """Returns the neurons' coefficients, given the branches: without ``b_post``."""
        activation, pre = self.require_activation(), self._scaled(pre)
        found = activation(pre[0])
        if self.gated:
            found = found * (pre[1] if self.bounds is None else pre[1].clamp(*self.bounds))
        return found if self.scales_input else self._weighted(found)

    def post_activation(self, pre: Sequence[Tensor]) -> Tensor:
        """Returns what W_out multiplies, given the branches: with ``b_post``."""
        return shift(self.activate(pre), self.weights("b_post"))

    def coefficients(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some neuron"]:
        """Returns what a pass multiplied each value vector with, at some places: no ``b_post``."""
        post, b_post = trace[self.post][where], self.weights("b_post")
        return post if b_post is None else post - b_post

    def followed(self, trace: Trace, where: Any = slice(None)) -> FeedForward:
        """Returns the sublayer with the routing of a pass held, at some places."""
        del trace, where
        return self

    def _weighted(self, x: Tensor) -> Tensor:
        """Returns numbers of neurons [*place *more neuron] times the gain of their place."""
        gain = self.gain
        if gain is None:
            return x
        return x * gain.view(*gain.shape[:-1], *[1] * (x.ndim - gain.ndim), gain.shape[-1])

    def _scaled(self, pre: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns pre-activations as the activation gets them."""
        return [self._weighted(x) for x in pre] if self.scales_input else pre

    def secant_slopes(
        self, start: Sequence[Tensor | None], end: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Returns for each branch what a share of its pre-activation is multiplied with.

        Args:
            start: Pre-activations at the start of the path, by branch; None for zero.
            end: At its end.
        """
        activation, end = self.require_activation(), self._scaled(end)
        start = [None if x is None else self._scaled([x])[0] for x in start]
        if not self.gated:
            return (self._weighted(activation.secant(start[0], end[0])),)
        pairs = zip(start, end, strict=True)
        linear, gate = gated_slopes(activation, *pairs, bounds=self.bounds)
        return self._weighted(gate), self._weighted(linear)

    def linearise(
        self, bias: Sequence[Tensor], total: Sequence[Tensor], fixed: bool
    ) -> tuple[tuple[Float[Tensor, "*some neuron"], ...], Float[Tensor, "*some neuron"]]:
        """Returns each branch's slope, and the share of the coefficients that is no token's.

        Args:
            bias: What is no token's in the pre-activations, by branch.
            total: The pre-activations.
            fixed: Whether the path starts from the bias rather than from zero.
        """
        if fixed:
            return self.secant_slopes(bias, total), self.activate(bias)
        slopes = self.secant_slopes([None] * len(total), total)
        # The path starts at zero; what the bias adds on the way exists only where it moves.
        moved = (share * slope for share, slope in zip(bias, slopes, strict=True))
        return slopes, sum(moved, self.activate([share.new_zeros(()) for share in bias]))

    def project(self, post: Float[Tensor, "... neuron"]) -> Float[Tensor, "... d_model"]:
        """Returns what the sublayer adds to the residual stream, given its neurons."""
        out = affine(post, self.W_out, self.weights("b_out"))
        return out if self.norm_out is None else self.norm_out(out)

    def edits_by(self, change: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Returns edits of a pass, by name of the activation, that change coefficients.

        What ``change`` gets has ``b_post`` in it.
        """
        return {self.post: change}

    def write(self, coefficients: Float[Tensor, "... neuron"]) -> Float[Tensor, "... d_model"]:
        """Returns the sum of the value vectors, each times its coefficient."""
        return multiply(coefficients, self.W_out)

    def along(self, gradient: Float[Tensor, "... d_model"]) -> Float[Tensor, "... neuron"]:
        """Returns the inner products with value vectors: the coefficients' gradient."""
        return gradient @ self.W_out.T

    def transmit(
        self, parts: Float[Tensor, "... d_model"], slopes: Sequence[Tensor]
    ) -> Float[Tensor, "... d_model"]:
        """Returns what parts of its input [*place *more d_model] become, by slopes."""
        W_out, weights = self.W_out, [weight for weight, _ in self.branches()]
        places = slopes[0].ndim - 1
        if 0 < places < parts.ndim - 1:  # several parts of a place, which has slopes of its own
            flat = [slope.flatten(0, -2) for slope in slopes]
            some = parts.flatten(0, places - 1).flatten(1, -2)
            out = transmit(some, weights, flat, W_out, self.silent)
            if out is not None:
                return out.view(*parts.shape[:-1], W_out.shape[1])
        more = [1] * (parts.ndim - slopes[0].ndim)
        each = [slope.view(*slope.shape[:-1], *more, slope.shape[-1]) for slope in slopes]
        return through_neurons(parts, weights, each, W_out)

    def pull_back(
        self, gradient: Float[Tensor, "some neuron"], slopes: Sequence[Tensor]
    ) -> Float[Tensor, "some d_model"]:
        """Returns the gradient of its input, given that of its coefficients."""
        result = gradient.new_zeros(())
        for (weight, _), slope in zip(self.branches(), slopes, strict=True):
            result = result + (gradient * slope) @ weight.T
        return result

    def offsets(self, shared: Float[Tensor, " d_model"] | None) -> list[Tensor]:
        """Returns the branches of an input that is the same for all: a norm's bias, or nothing."""
        if shared is not None:
            return self.pre_activations(shared)
        return [weight.new_zeros(()) if bias is None else bias for weight, bias in self.branches()]

    def select(self, neurons: Int[Tensor, " some"]) -> FeedForward:
        """Returns the sublayer with some of its neurons alone, and without ``b_out``."""

        def weights(name: str) -> Tensor | None:
            found = None if name == "b_out" else self.weights(name)
            if found is None:
                return None
            some = beside(found, neurons)
            return found[:, some] if name in ("W_in", "W_gate") else found[some]

        return replace(self, weights=weights)

    def number(
        self, expert: Int[Tensor, " some"], neuron: Int[Tensor, " some"]
    ) -> Int[Tensor, " some"]:
        """Returns places on the neuron axis, of neurons of experts; -1 where there are none."""
        del expert
        return neuron

    def groups(self) -> Iterator[tuple[int | None, slice, Callable[[], Tensor]]]:
        """Yields the experts: number, its neurons, value vectors. One, without number."""
        yield None, slice(0, self.width), lambda: self.W_out

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what it computed in a pass, before a norm of that and edits."""
        post = trace[self.post][where]
        key = (self.post, self.weights)
        found = trace.once(key, post, lambda: affine(post, self.W_out, self.weights("b_out")))
        return shift(found, trace[self.missing][where] if self.missing else None)

    def output(
        self, trace: Trace, where: Any = slice(None), raw: Tensor | None = None
    ) -> Float[Tensor, "*some d_model"]:
        """Returns what it adds to the residual stream at some places, edits included."""
        edit = trace.edit(self.edits.raw)
        found = self.raw_output(trace, where) if raw is None else raw
        return super().output(trace, where, shift(found, None if edit is None else edit[where]))


def sum_names(sublayer: Sublayer) -> tuple[str, ...]:
    """Returns the name of the residual sum that the norm after a sublayer reads, where shown."""
    return () if sublayer.norm_after is None else sublayer.edits.stream[:1]


@dataclass(frozen=True)
class Rewrite:
    """A dictionary in the residual stream: features and their error stand for what was written.

    Attributes:
        written: How many of the block's sublayers have written by then.
        features: The features.
    """

    written: int
    features: FeedForward


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        layer: Its number in the stack.
        resid_in: Name of the residual stream that enters it.
        resid_out: Name of the residual stream that leaves it.
        attentions: Its attention sublayers in order; a decoder with cross-attention has two.
        feed_forward: Its feed-forward sublayer, or None (attention-only).
        parallel: Whether the feed-forward sublayer reads the block's input (GPT-J, Pythia).
        mixers: Sublayers beside attention, or in its place, that mix tokens in another way.
        ending: A third sublayer, after the feed-forward one, or None.
        folds: Products of its weights that are kept for the next call, by name, and what tells
            whether a weight has changed; None where those of all blocks would take more than
            `FOLD_BYTES`.
        rewrite: A dictionary in its stream, or None.
    """

    layer: int
    resid_in: str
    resid_out: str
    attentions: tuple[AttentionSublayer, ...]
    feed_forward: FeedForward | None
    parallel: bool = False
    mixers: tuple[Mixer, ...] = ()
    ending: FeedForward | None = None
    folds: dict[str, tuple[Tensor, ...]] | None = field(default=None, repr=False, compare=False)
    rewrite: Rewrite | None = None

    def attention(self, kind: str) -> AttentionSublayer:
        """Returns its attention sublayer of a kind: ``"self"`` or ``"cross"``.

        Raises:
            UnsupportedModel: If it mixes tokens in another way.
        """
        found = [one for one in self.attentions if one.kind == kind]
        if not found:
            self.require_attention()
        return found[0]

    def require_attention(self) -> None:
        """Checks that nothing but attention brings other tokens into its stream.

        Raises:
            UnsupportedModel: If something does.
        """
        for mixer in self.mixers:
            raise UnsupportedModel(mixer.refusal)

    @property
    def memories(self) -> FeedForward | None:
        """Its features, where a dictionary stands in its stream, or feed-forward sublayer."""
        return self.feed_forward if self.rewrite is None else self.rewrite.features

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Its sublayers in order."""
        return (*self.attentions, *self.mixers, *self.feed_forwards)

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """Its feed-forward sublayer and a third one, as far as there are any."""
        return tuple(one for one in (self.feed_forward, self.ending) if one is not None)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.attentions[0].W_O.shape[2] if self.attentions else self.mixers[0].d_model

    def made(self) -> tuple[str, ...]:
        """Returns the names of the activations that its dictionaries make, if it has any."""
        some = (self.feed_forward, None if self.rewrite is None else self.rewrite.features)
        features = [one for one in some if one is not None and one.point]
        return tuple(name for one in features for name in (one.pre, one.post, one.missing))

    def points(self) -> tuple[str, ...]:
        """Returns the names of the activations that a map of this block needs."""
        reads = [n for a in self.attentions for n in (a.pattern, a.value, a.gate) if n]
        reads += [mixer.out for mixer in self.mixers]
        return (self.resid_in, *reads, *(n for ff in self.feed_forwards for n in ff.held_names))

    def held(self, trace: Trace) -> Block:
        """Returns the block with what is held of a pass: routings, a third sublayer's vectors."""
        names = ("feed_forward", "ending")
        every = {name: getattr(self, name) for name in names}
        held = {name: ff.followed(trace) for name, ff in every.items() if ff and ff.held_names}
        return replace(self, **held) if held else self

    def spared(self) -> tuple[str, ...]:
        """Returns the names of activations that spare work where they are at hand."""
        return tuple(attention.mixed for attention in self.attentions)

    def checkpoints(self) -> tuple[str, ...]:
        """Returns the names of the activations that tell whether the block is read right."""
        mixed = tuple(attention.mixed for attention in self.attentions)
        mixed += tuple(mixer.out for mixer in self.mixers)
        return (*mixed, *(n for ff in self.feed_forwards for n in ff.shown()), self.resid_out)

    def fold_size(self) -> int:
        """Returns how many numbers its W_O takes when folded into its W_in."""
        ff = self.feed_forward
        if ff is None or not self.attentions:
            return 0
        heads, d_head, _ = self.attentions[0].W_O.shape
        return heads * d_head * sum(weight.shape[1] for weight, _ in ff.branches())

    def feed_forward_input(self, trace: Trace) -> Float[Tensor, "batch target d_model"]:
        """Returns the residual stream that the feed-forward sublayer reads, before its norm."""
        return trace.resid_in(self) if self.parallel else self.middle(trace)

    def read_by(self, ff: FeedForward, trace: Trace) -> Float[Tensor, "batch target d_model"]:
        """Returns the residual stream that a feed-forward or third sublayer reads."""
        if ff is self.ending:
            return self.written(trace, len(self.sublayers) - 1)
        return self.feed_forward_input(trace)

    def middle(self, trace: Trace) -> Float[Tensor, "batch target d_model"]:
        """Returns the residual stream after the attention sublayers, mixers and their norms."""
        return self.written(trace, len(self.attentions) + len(self.mixers))

    def output(self, trace: Trace) -> Float[Tensor, "batch target d_model"]:
        """Returns the block's output, recomputed from its input, patterns, values and neurons."""
        return self.written(trace, len(self.sublayers))

    def written(
        self, trace: Trace, sublayers: int, normed: bool = True
    ) -> Float[Tensor, "batch target d_model"]:
        """Returns the residual stream after so many sublayers of a pass, steering included.

        Args:
            trace: The pass.
            sublayers: How many of its sublayers have written.
            normed: Whether the norm of the last one's sum is passed, too (post-LN).
        """
        stream = trace.resid_in(self)
        for place, sublayer in enumerate(self.sublayers[:sublayers], start=1):
            out, last = sublayer.output(trace), place == sublayers
            stream = after(stream, sublayer, out, trace, normed=normed or not last)
        return stream


@dataclass(frozen=True)
class Side:
    """Token ids of one stack and which of them are real.

    Attributes:
        ids: Token ids, padding included.
        mask: True at real tokens.
        roles: Of a chat, whose message each token is of; -1 at padding.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    roles: Int[Tensor, "batch pos"] | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether no token is padding."""
        return bool(self.mask.all())

    def each(self, change: Callable[[Tensor], Tensor]) -> Side:
        """Returns the side with its tensors changed."""
        roles = None if self.roles is None else change(self.roles)
        return Side(change(self.ids), change(self.mask), roles)


@dataclass(frozen=True)
class Batch:
    """What a forward pass is given.

    Attributes:
        main: The tokens; an encoder-decoder's encoder side.
        decoder: The decoder side of an encoder-decoder, else None.
        further: What else the model's own forward is given of each token of the main side, by
            the name of the argument: segment ids, position ids; or the sound that they are of.
        past: Returns arguments of the model's own forward with the keys and values of positions
            before these, which are not run; None where these are all.
    """

    main: Side
    decoder: Side | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)
    past: Callable[[], Mapping[str, Any]] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Returns the batch with all of its tensors changed: rows taken, repeated, copied."""
        return Batch(
            main=self.main.each(change),
            decoder=None if self.decoder is None else self.decoder.each(change),
            further={name: change(value) for name, value in self.further.items()},
        )

    def side(self, stack: str) -> Side:
        """Returns the tokens of a stack (``"cross"`` writes decoder positions)."""
        return self.main if self.decoder is None or stack == "encoder" else self.decoder


@dataclass(frozen=True)
class Trace:
    """The activations of a forward pass, in the dtype of the maths.

    Attributes:
        batch: The tokens that went in.
        values: Activations by name.
        dtype: Dtype of the maths: the model's, but at least float32.
        logits: The model's output, or None where the pass ended before it, or is a cache's.
        edits: What hooks of the user's own added, by the name of the hook point; nothing where a
            hook left everything as it was.
        changed: Names of `AttentionSublayer.mixed` that are not pattern times value.
        edited: Whether hooks may have edited the pass.
        known: What was recomputed, by key and input, where that is kept; see `once`.
        spans: What `look_up` has found, by the name of the pattern.
    """

    batch: Batch
    values: Mapping[str, Tensor]
    dtype: torch.dtype
    logits: Tensor | None = None
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    edited: bool = False
    known: dict[Any, list[tuple[Tensor, Any]]] | None = field(
        default=None, repr=False, compare=False
    )
    spans: dict[str, Int[Tensor, "2 batch target"]] = field(default_factory=dict)

    def once(self, key: object, x: Tensor, make: Callable[[], Any]) -> Any:
        """Returns what is made of an input; if `known` is there, of the same input only once.

        Args:
            key: What is made, and of which weights.
            x: What it is made of.
            make: Makes it.
        """
        if self.known is None:
            return make()
        before = self.known.setdefault(key, [])
        for other, result in before:
            if other.shape == x.shape and torch.equal(other, x):
                return result
        before.append((x, make()))
        return before[-1][1]

    def __getitem__(self, name: str) -> Tensor:
        """Returns one activation in the dtype of the maths."""
        return self.values[name].to(self.dtype)

    def part(self, rows: slice) -> Trace:
        """Returns some rows of the pass, without a copy."""
        values = {name: value[rows] for name, value in self.values.items()}
        batch = self.batch.each(lambda tensor: tensor[rows])
        edits = {name: edit[rows] for name, edit in self.edits.items()}
        spans = {name: span[:, rows] for name, span in self.spans.items()}
        return replace(self, batch=batch, values=values, logits=None, edits=edits, spans=spans)

    def look_up(self, blocks: Sequence[Block]) -> None:
        """Copies to the host which sources the targets of some blocks read: of all at once.

        What is skipped where nothing is read is decided there; a GPU would be waited for in every
        layer.
        """
        every = [attention for block in blocks for attention in block.attentions]
        new = {one.pattern: one for one in every if one.pattern in self.values}
        new = {name: one for name, one in new.items() if name not in self.spans}
        if not new:
            return
        found = [ends_of((self.pattern(one) != 0).any(dim=1)) for one in new.values()]
        together = torch.cat([span.flatten() for span in found]).cpu()
        parts = together.split([span.numel() for span in found])
        spans = (part.view(span.shape) for part, span in zip(parts, found, strict=True))
        self.spans.update(zip(new, spans, strict=True))

    def summed(self, sublayer: Sublayer) -> Float[Tensor, "batch target d_model"] | None:
        """Returns the residual sum that the norm after a sublayer read, where it was kept.

        None of a half-precision model, which has rounded it.
        """
        kept = [self.values[name] for name in sum_names(sublayer) if name in self.values]
        return kept[0] if kept and kept[0].dtype == self.dtype else None

    def edit(self, names: Sequence[str]) -> Tensor | None:
        """Returns what hooks added at some points, in the dtype of the maths; None if nothing."""
        found = [self.edits[name] for name in names if name in self.edits]
        return sum(found[1:], found[0]).to(self.dtype) if found else None

    def resid_in(self, block: Block) -> Float[Tensor, "batch target d_model"]:
        """Returns the residual stream that enters a block."""
        return self[block.resid_in]

    def pattern(self, attention: AttentionSublayer) -> Float[Tensor, "batch head target source"]:
        """Returns attention probabilities; rows of padding are zero, they are not the model's."""
        pattern = self[attention.pattern]
        side = self.batch.side(attention.stack)
        if side.whole:
            return pattern
        return pattern.masked_fill(~side.mask.to(pattern.device)[:, None, :, None], 0)

    def sink(self, attention: AttentionSublayer) -> Float[Tensor, "batch head target"]:
        """Returns the share of each row that goes to the softmax's own sink; 0 without one.

        What hooks of the user's own make of the pattern takes nothing from it. What they did
        before a cache was made is not known: the share is then that of the scores, if they are
        there.
        """
        pattern, edit = self.pattern(attention), self.edit((attention.pattern,))
        if not attention.sink_scores:
            return torch.zeros_like(pattern[..., 0])
        real = self.batch.side(attention.stack).mask.to(pattern.device)
        if attention.sink_scores in self.values:
            scores = self[attention.sink_scores]
            logit = require_weight(attention.weights, "sinks")[:, None, None]
            both = torch.cat([scores, logit.to(scores).expand_as(scores[..., :1])], dim=-1)
            return both.softmax(dim=-1)[..., -1] * real[:, None]
        sums = (pattern if edit is None else pattern - edit).sum(-1)
        return (1 - sums).clamp(min=0) * real[:, None]

    def value(self, attention: AttentionSublayer) -> Float[Tensor, "batch source head d_head"]:
        """Returns value vectors per query head (a shared value is repeated)."""
        return self._per_query_head(attention, attention.value)

    def key(self, attention: AttentionSublayer) -> Float[Tensor, "batch source head d_head"]:
        """Returns key vectors per query head (a shared key is repeated)."""
        return self._per_query_head(attention, attention.key)

    def _per_query_head(self, attention: AttentionSublayer, name: str) -> Tensor:
        shared = self[name]
        heads = self.values[attention.pattern].shape[1]
        return shared.repeat_interleave(heads // shared.shape[2], dim=2)

    def mixed(self, attention: AttentionSublayer) -> Float[Tensor, "batch target head d_head"]:
        """Returns pattern-weighted values: the model's own where they are exact, else recomputed.

        A half-precision model has rounded them. Those that hooks changed are taken as they are.
        """
        kept = self.values.get(attention.mixed)
        if kept is not None and (kept.dtype == self.dtype or attention.mixed in self.changed):
            return kept.to(self.dtype)
        return self.mix(attention)

    def mix(
        self, attention: AttentionSublayer, pattern: Tensor | None = None
    ) -> Float[Tensor, "batch target head d_head"]:
        """Returns pattern times value, times the gate where there is one.

        Args:
            attention: The sublayer.
            pattern: Another pattern; None for its own.
        """
        mixed = einsum(
            self.pattern(attention) if pattern is None else pattern,
            self.value(attention),
            "batch head target source, batch source head d_head -> batch target head d_head",
        )
        gate = self.gate(attention)
        return mixed if gate is None else mixed * gate

    def gate(
        self, attention: AttentionSublayer
    ) -> Float[Tensor, "batch target head d_head"] | None:
        """Returns what multiplies what heads read, or None."""
        if not attention.gate:
            return None
        heads = self.values[attention.pattern].shape[1]
        return self[attention.gate].flatten(2).unflatten(2, (heads, -1)).sigmoid()

    def mixing(self, attention: AttentionSublayer) -> Float[Tensor, "batch head target source"]:
        """Returns what values are weighted with: the pattern, times what hooks scaled heads with.

        A head that is ablated at its z is scaled with zero. The factor is that of the projection
        on pattern times value; the identity ``mixing`` says whether there is one.
        """
        pattern, factor = self.pattern(attention), self.factor(attention)
        return pattern if factor is None else pattern * factor.transpose(1, 2)[..., None]

    def factor(self, attention: AttentionSublayer) -> Float[Tensor, "batch target head"] | None:
        """Returns what hooks scaled heads with, see `mixing`; None where they did not."""
        if attention.mixed not in self.changed:
            return None
        plain, found = self.mix(attention), self[attention.mixed]
        return (found * plain).sum(-1) / plain.square().sum(-1).clamp(min=1e-30)


def after(
    stream: Float[Tensor, "batch target d_model"],
    sublayer: Sublayer,
    out: Float[Tensor, "batch target d_model"],
    trace: Trace,
    normed: bool = True,
) -> Float[Tensor, "batch target d_model"]:
    """Returns the residual stream after a sublayer of a pass, given its output; see `written`."""
    stream = shift(stream + out, trace.edit(sublayer.edits.stream))
    return sublayer.norm_after(stream) if normed and sublayer.norm_after is not None else stream


def require_weight(weights: Weights, name: str) -> Tensor:
    """Returns a weight that must be there.

    Raises:
        UnsupportedModel: If the model does not have it.
    """
    weight = weights(name)
    if weight is None:
        raise UnsupportedModel(
            f"the model's {name} cannot be read",
            "no such weight",
            "one dense matrix per sublayer",
            "Experts, fused or quantised layers are not supported.",
        )
    return weight


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``x weight + bias``."""
    return shift(multiply(x, weight), bias)


def shift(x: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``x + bias``, or ``x`` where there is none."""
    return x if bias is None else x + bias
