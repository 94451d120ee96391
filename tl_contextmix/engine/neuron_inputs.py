r"""What a neuron reads: its pre-activation as a sum over everything written to its stream.

A feed-forward neuron's input is :math:`z = \mathrm{LN}(h) \cdot k + b` with :math:`k` a column of
W_in, and :math:`h` the sum that `stream` gives; an attention neuron's is the same with a column of
W_V and the stream of the *source*. With the norm's scale :math:`s` frozen at the real value,

.. math:: z = \sum_c \frac{C(c) \gamma \cdot k}{s} + \beta \cdot k + b,

centred inner products that add up exactly. The activation's share of each is its own secant slope
times the product (`activations`); in gated blocks both branches share by integrated gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import Block, FeedForward, Trace, affine
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.residual_stream import Stop, Stream, decompose_stream
from tl_contextmix.core.token_sums import FrozenNorm
from tl_contextmix.engine.log_prob_scores import Split
from tl_contextmix.errors import UnsupportedModel
from tl_contextmix.results.components import Components


@dataclass(frozen=True)
class Place:
    """Where streams are read by neurons: several neurons may share one.

    Attributes:
        stack: The stack.
        pos: The position whose stream is read.
        stop: Where; None for cross-attention, which reads the whole encoder.
    """

    stack: str
    pos: int
    stop: Stop | None


@dataclass(frozen=True)
class NeuronInputs:
    """Neurons of one sentence that read the same stream.

    Attributes:
        stream: The stream, of that sentence alone.
        norm: The norm before them, frozen at the stream.
        keys: Their input weights, one matrix per branch (gated: gate, then linear).
        constants: Their biases per branch, the norm's included.
        slopes: What an inner product of each branch is multiplied with, as a share of the
            activation.
        constant_share: The activation of no input at all (0 for the activations in use).
    """

    stream: Stream
    norm: FrozenNorm
    keys: tuple[Float[Tensor, "d_model neuron"], ...]
    constants: tuple[Float[Tensor, " neuron"], ...]
    slopes: tuple[Float[Tensor, " neuron"], ...]
    constant_share: Float[Tensor, " neuron"]

    @property
    def pre(self) -> tuple[Float[Tensor, " neuron"], ...]:
        """Pre-activations of each branch: the model's own, to rounding."""
        return tuple(
            self.inner(self.stream.total, branch)[0] + constant
            for branch, constant in enumerate(self.constants)
        )

    @property
    def activation(self) -> Float[Tensor, " neuron"]:
        """Activations: the shares of everything added up."""
        pairs = zip(self.pre, self.slopes, strict=True)
        return sum((pre * slope for pre, slope in pairs), self.constant_share)

    def inner(
        self, vectors: Float[Tensor, "some d_model"], branch: int = 0
    ) -> Float[Tensor, "some neuron"]:
        """Returns inner products of vectors with each neuron's key, norm scale frozen."""
        return self.norm.unscaled(vectors) @ self.keys[branch] / self.norm.scale

    def uncentred(self, vectors: Float[Tensor, "some d_model"]) -> Float[Tensor, "some neuron"]:
        """Returns the authors' inner products: with the gain, without mean and scale."""
        gain = self.norm.norms[0].weight if self.norm.norms else None
        return (vectors if gain is None else vectors * gain) @ self.keys[0]

    def product(
        self, vectors: Float[Tensor, "some d_model"], branch: int | None
    ) -> Float[Tensor, "some neuron"]:
        """Returns `inner`, or `uncentred` where no branch is given."""
        return self.uncentred(vectors) if branch is None else self.inner(vectors, branch)

    def inner_of(self, split: Split, branch: int | None = 0) -> Float[Tensor, "component neuron"]:
        """Returns the inner products of every component of a split.

        Args:
            split: The split, of this stream.
            branch: Which branch; None for the authors' products.
        """
        if split.neurons is None:
            assert split.vectors is not None
            return self.product(split.vectors()[0], branch)
        # Each vector is multiplied with the keys once, whatever the number of sources.
        each = self.product(split.neurons.vectors(slice(None)), branch)
        return (split.neurons.coefficients[0, :, :, None] * each).flatten(0, 1)

    def shares(self, inner: tuple[Tensor, ...]) -> Float[Tensor, "component neuron"]:
        """Returns the share of each neuron's activation, from the inner products per branch."""
        pairs = zip(inner, self.slopes, strict=True)
        return sum((one * slope for one, slope in pairs), torch.zeros_like(inner[0]))


def place_of(view: ModelView, chosen: Components, row: int, index: int) -> Place:
    """Returns where a chosen neuron reads."""
    one = chosen.at(row, index)
    kind, layer = one["kind"], one["layer"]
    stack = "encoder" if kind.startswith("encoder ") else view.base_stack(None)
    if kind == "cross_attn":
        return Place("encoder", one["source"], None)
    kind = kind.removeprefix("encoder ")
    block = view.stacks[stack][layer]
    if kind == "attn" and (lender := block.attention("self").lender) is not None:
        block = view.stacks[stack][lender]  # whose values it uses
    stop = Stop.before(block, kind)
    return Place(stack, one["pos"] if kind == "mlp" else one["source"], stop)


def neuron_inputs_at(
    view: ModelView, trace: Trace, place: Place, chosen: Components, row: int, some: list[int]
) -> NeuronInputs:
    """Returns the neurons of a sentence that read at one place.

    Args:
        view: The model.
        trace: The pass over the sentence.
        place: The place.
        chosen: Neurons.
        row: Their row.
        some: Which of them read there.
    """
    pos = torch.tensor([place.pos])
    stream = decompose_stream(view, trace, place.stack, pos, stop=place.stop)
    kind, layer = chosen.at(row, some[0])["kind"], int(chosen.layer[row, some[0]])
    stack = "encoder" if kind.startswith("encoder ") else view.base_stack(None)
    block = view.stacks[stack][layer]
    if kind.endswith("mlp"):
        assert block.feed_forward is not None
        numbers = (getattr(chosen, name)[row][some] for name in ("expert", "neuron"))
        index = block.feed_forward.number(*(x.to(view.device) for x in numbers))
        at = torch.zeros_like(pos), pos
        ff = block.feed_forward.followed(trace, at).select(index)
        result = _feed_forward(ff, stream)
        own = block.feed_forward.coefficients(trace, at)[0, index]
    else:
        result, value = _attention(view, trace, block, place, stream, chosen, row, some)
        own = result.slopes[0] * value
    if view.hooked():
        _require_own(view, result, own)
    return result


def _require_own(view: ModelView, found: NeuronInputs, own: Float[Tensor, " neuron"]) -> None:
    """Checks that activations are what was written to the stream that the neurons read."""
    pairs = zip(found.slopes, found.pre, strict=True)
    size = reduce(add, ((slope * pre).abs() for slope, pre in pairs))
    error = float((found.activation - own).abs().max() / size.max().clamp(min=1e-30))
    if not error <= view.tolerance:
        raise UnsupportedModel(
            "what these neurons read is not the sum of what was written to their stream",
            f"activations with a relative error of {error:.2g}, with hooks of your own at "
            f"{', '.join(view.hooked()[:3])}",
            f"at most {view.tolerance:.0e}",
            "Take off hooks that edit the stream, a norm or the neurons where they are read.",
        )


def _feed_forward(ff: FeedForward, stream: Stream) -> NeuronInputs:
    """Returns the neurons of a sublayer that has no others, at one place."""
    ff = ff.part(0)
    norm, branches = FrozenNorm.at(ff.norm_in, stream.total), ff.branches()
    keys = tuple(key for key, _ in branches)
    constants = tuple(_constant(norm, key, bias) for key, bias in branches)
    nothing = torch.zeros_like(constants[0])
    found = NeuronInputs(stream, norm, keys, constants, (), ff.activate([nothing] * len(keys)))
    return replace(found, slopes=ff.secant_slopes([None] * len(keys), found.pre))


def _attention(
    view: ModelView,
    trace: Trace,
    block: Block,
    place: Place,
    stream: Stream,
    chosen: Components,
    row: int,
    some: list[int],
) -> tuple[NeuronInputs, Tensor]:
    """Returns attention neurons and their values as the model computed them."""
    kind = chosen.at(row, some[0])["kind"].removeprefix("encoder ")
    sublayer = next(a for a in block.attentions if (a.kind == "self") == (kind == "attn"))
    heads, index = (getattr(chosen, name)[row][some].to(view.device) for name in ("head", "neuron"))
    reader = sublayer
    if sublayer.lender is not None:
        reader = view.stacks[place.stack][sublayer.lender].attention("self")
    key = reader.W_V[heads, :, index].T
    bias = reader.weights("b_V")
    norm_in = view.final_norms.get("encoder") if place.stop is None else reader.norm_in
    norm = FrozenNorm.at(norm_in, stream.total)
    bias = None if bias is None else bias[heads, index]
    scale = reader.value_scale(norm.affine(stream.total)[0])
    if scale is not None:
        scale = scale[:, 0].expand(len(sublayer.W_O))[heads]
        key, bias = key / scale, None if bias is None else bias / scale
    constant = _constant(norm, key, bias)
    target = chosen.pos[row][some].to(view.device)
    slope, gate = trace.mixing(sublayer)[0, heads, target, place.pos], trace.gate(sublayer)
    slope = slope if gate is None else slope * gate[0, target, heads, index]
    value = trace.value(sublayer)[0, place.pos, heads, index]
    found = NeuronInputs(stream, norm, (key,), (constant,), (slope,), torch.zeros_like(constant))
    return found, value


def _constant(norm: FrozenNorm, key: Tensor, bias: Tensor | None) -> Tensor:
    nothing = torch.zeros_like(key[:, 0])
    return affine(norm.affine(nothing[None])[0], key, bias)
