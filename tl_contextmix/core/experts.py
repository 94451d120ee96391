"""A mixture of experts as one feed-forward sublayer, whose neurons are those of all experts.

An expert is a feed-forward sublayer with a gain per token: the router's weight. Experts follow one
another on the neuron axis, shared ones last. A token has coefficients other than zero in the few
experts it is routed to, and products are taken for these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import FeedForward, Trace

Router = Callable[[Float[Tensor, "*place d_model"]], Float[Tensor, "*place expert"]]


@dataclass(frozen=True)
class Experts(FeedForward):
    """A feed-forward sublayer of experts: ``sum_e gain_e expert_e(x)``.

    ``pre`` and ``post`` both name what the experts read, the sublayer's normed input: hosts show no
    neurons of experts, they are recomputed from it. ``gain`` [*place expert] is the routing that is
    held, see `routed`.

    Attributes:
        experts: The experts, shared ones last.
        router: Returns the gain of every expert; zero for those that a token is not routed to.
        written: Name of what the sublayer computes.
        edited: Name of an activation that is part of that and can be edited; empty: all of it.
        sizes: How many neurons each expert has.
        active: How many experts a token is routed to, shared ones included.
        d_model: Width of what it reads and writes.
    """

    experts: tuple[FeedForward, ...] = ()
    router: Router | None = field(default=None, repr=False)
    written: str = ""
    edited: str = ""
    sizes: tuple[int, ...] = ()
    active: int = 0
    d_model: int = 0
    routes: ClassVar[bool] = True

    @property
    def held_names(self) -> tuple[str, ...]:
        """Names of the activations that `followed` reads."""
        return (self.post,)

    @property
    def gated(self) -> bool:
        """Whether the experts have two branches."""
        return self.experts[0].gated

    @property
    def width(self) -> int:
        """How many neurons there are, those of all experts together."""
        return sum(self.sizes)

    @property
    def busy(self) -> int:
        """How many of them a token uses at most."""
        return sum(sorted(self.sizes)[-self.active :])

    @property
    def pre_names(self) -> tuple[str, ...]:
        """Nothing: hosts do not show what experts compute."""
        return ()

    @property
    def read_names(self) -> tuple[str, ...]:
        """Names of the activations that tell what the sublayer reads, as `reread` has them."""
        return (self.post, self.written)

    def reread(self, x: Float[Tensor, "*some d_model"]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields the experts' input and what they make of it, see `FeedForward.reread`."""
        yield "recomputed experts' input", self.post, x
        yield "experts(input) = output", self.written, self.compute(x)

    def __call__(self, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Returns what it adds to the residual stream, given what it reads; it routes anew."""
        out = self.compute(stream if self.norm_in is None else self.norm_in(stream))
        return out if self.norm_out is None else self.norm_out(out)

    def branches(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Returns nothing: each expert has branches of its own."""
        return ()

    def gains(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place expert"]:
        """Returns the router's weight of every expert, zero where it is not chosen."""
        assert self.router is not None
        return self.router(x)

    def chosen(self, stream: Float[Tensor, "*place d_model"]) -> Bool[Tensor, "*place expert"]:
        """Returns which experts a residual stream is routed to."""
        return self.gains(stream if self.norm_in is None else self.norm_in(stream)) != 0

    def holding(self, x: Tensor) -> Experts:
        """Returns the sublayer with a routing held: that of its inputs, if none is yet."""
        return self.routed(x) if self.gain is None else self

    def routed(self, x: Tensor) -> Experts:
        """Returns the sublayer with the routing of some (normed) inputs held."""
        return replace(self, gain=self.gains(x))

    def followed(self, trace: Trace, where: Any = slice(None)) -> Experts:
        """Returns the sublayer with the routing of a pass held, at some places."""
        return self.routed(trace[self.post][where])

    def coefficients(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some neuron"]:
        """Returns the router's weight times the activation, of every neuron."""
        x = trace[self.post][where]
        held = self.routed(x)
        return held.activate(held.pre_activations(x))

    def signs(self, trace: Trace) -> Int[Tensor, "batch pos neuron"]:
        """Returns twice whether the gate is negative, and whether the linear branch is.

        -1 in experts that a token is not routed to.
        """
        x, activation = trace[self.post], self.require_activation()
        result = x.new_full((*x.shape[:-1], self.width), -1, dtype=torch.long)
        for one, rows, columns in self.routed(x)._each():
            gate, linear = one.pre_activations(x[rows])
            result[_index(rows, columns)] = 2 * (activation(gate) < 0).long() + (linear < 0).long()
        return result

    def raw_output(self, trace: Trace, where: Any = slice(None)) -> Float[Tensor, "*some d_model"]:
        """Returns what it computed in a pass, before a norm of that and edits."""
        return self.compute(trace[self.post][where])

    def compute(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Returns what it makes of its (normed) input, before a norm of that; it routes anew."""
        out = torch.zeros_like(x)
        for one, rows, _ in self.routed(x)._each():
            inner = one.activate(one.pre_activations(x[rows]))
            out[rows] += one.write(inner) + one.constant()
        return out

    def constant(self) -> Float[Tensor, "*place d_model"]:
        """Returns what the experts' biases add, each times its gain."""
        out = self._place(self.d_model)
        for one, rows, _ in self._each():
            if one.weights("b_out") is not None:
                out[rows] += one.constant()
        return out

    def pre_activations(self, x: Tensor) -> list[Tensor]:
        """Returns what the chosen experts' branches compute; zero in the others."""
        x = x.expand(*self._held.shape[:-1], -1) if x.ndim < self._held.ndim else x
        result = [x.new_zeros(*x.shape[:-1], self.width) for _ in range(1 + self.gated)]
        for one, rows, columns in self._each():
            for out, pre in zip(result, one.pre_activations(x[rows]), strict=True):
                out[_index(rows, ..., columns)] = pre
        return result

    def activate(self, pre: Sequence[Tensor]) -> Tensor:
        """Returns the neurons' coefficients, given the branches."""
        out = self._place(self.width)
        for one, rows, columns in self._each():
            out[_index(rows, ..., columns)] = one.activate(_some(pre, rows, columns))
        return out

    def secant_slopes(
        self, start: Sequence[Tensor | None], end: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Returns for each branch what a share is multiplied with; zero where not chosen."""
        result = tuple(torch.zeros_like(one) for one in end)
        for one, rows, columns in self._each():
            begin = [None if x is None else _some([x], rows, columns)[0] for x in start]
            slopes = one.secant_slopes(begin, _some(end, rows, columns))
            for out, slope in zip(result, slopes, strict=True):
                out[_index(rows, ..., columns)] = slope
        return result

    def write(self, coefficients: Float[Tensor, "... neuron"]) -> Float[Tensor, "... d_model"]:
        """Returns the sum of the value vectors, each times its coefficient.

        Of experts all of whose coefficients are zero nothing is read.
        """
        out = coefficients.new_zeros(*coefficients.shape[:-1], self.d_model)
        for expert, columns in self._stretches():
            rows = coefficients[..., columns].any(dim=-1).nonzero(as_tuple=True)
            if len(rows[0]):
                out[rows] += coefficients[_index(rows, columns)] @ expert.W_out
        return out

    def edits_by(self, change: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Returns edits of a pass that change coefficients, which hosts do not show."""
        seen: list[Tensor] = []

        def read(x: Tensor) -> Tensor:
            seen[:] = [x]
            return x

        def write(out: Tensor) -> Tensor:
            x = seen[0].to(torch.promote_types(out.dtype, torch.float32))
            held = self.routed(x)
            before = held.activate(held.pre_activations(x))
            return out + held.write(change(before) - before).to(out)

        return {self.post: read, self.edited or self.written: write}

    def along(self, gradient: Float[Tensor, "... d_model"]) -> Float[Tensor, "... neuron"]:
        """Returns the inner products with the chosen experts' value vectors, else zero."""
        out = gradient.new_zeros(*gradient.shape[:-1], self.width)
        for one, rows, columns in self._each():
            out[_index(rows, ..., columns)] = one.along(gradient[rows])
        return out

    def transmit(
        self, parts: Float[Tensor, "... d_model"], slopes: Sequence[Tensor]
    ) -> Float[Tensor, "... d_model"]:
        """Returns what parts of its input [*place *more d_model] become, by slopes."""
        out = torch.zeros_like(parts)
        for one, rows, columns in self._each():
            out[rows] += one.transmit(parts[rows], _some(slopes, rows, columns))
        return out

    def pull_back(
        self, gradient: Float[Tensor, "some neuron"], slopes: Sequence[Tensor]
    ) -> Float[Tensor, "some d_model"]:
        """Returns the gradient of its input, given that of its coefficients."""
        out = gradient.new_zeros(*gradient.shape[:-1], self.d_model)
        for one, rows, columns in self._each():
            inner = _some(slopes, rows, columns)
            out[rows] += one.pull_back(gradient[_index(rows, ..., columns)], inner)
        return out

    def offsets(self, shared: Float[Tensor, " d_model"] | None) -> list[Tensor]:
        """Returns the branches of an input that is the same for all: a norm's bias, or nothing."""
        return self.pre_activations(
            self._held.new_zeros(self.d_model) if shared is None else shared
        )

    def select(self, neurons: Int[Tensor, " some"]) -> FeedForward:
        """Returns some of its neurons alone, as a sublayer without experts and ``b_out``."""
        number, inside = self.expert_of(neurons)
        order = number.argsort(stable=True)
        back = order.argsort()

        def weights(name: str) -> Tensor | None:
            found = []
            for index in number[order].unique_consecutive().tolist():
                some = inside[order][number[order] == index]
                found.append(self.experts[index].select(some).weights(name))
            if any(one is None for one in found):
                return None
            across = name in ("W_in", "W_gate")
            whole = torch.cat(found, dim=1 if across else 0)
            return whole[:, back] if across else whole[back]

        first = self.experts[0]
        gain = None if self.gain is None else self.gain[..., number]
        return replace(
            first, weights=weights, gain=gain, norm_in=self.norm_in, norm_out=self.norm_out
        )

    def expert_of(self, neurons: Int[Tensor, " *some"]) -> tuple[Tensor, Tensor]:
        """Returns which expert neurons belong to, and their number in it."""
        stops = torch.tensor([*accumulate(self.sizes)], device=neurons.device)
        number = torch.searchsorted(stops, neurons.contiguous(), right=True)
        starts = stops - torch.tensor(self.sizes, device=neurons.device)
        return number, neurons - starts[number]

    def number(
        self, expert: Int[Tensor, " some"], neuron: Int[Tensor, " some"]
    ) -> Int[Tensor, " some"]:
        """Returns places on the neuron axis, of neurons of experts."""
        starts = torch.tensor([0, *accumulate(self.sizes)], device=expert.device)
        return starts[expert] + neuron

    def groups(self) -> Iterator[tuple[int | None, slice, Callable[[], Tensor]]]:
        """Yields the experts: number, stretch of the neurons, value vectors."""
        for index, (expert, columns) in enumerate(self._stretches()):
            yield index, columns, partial(getattr, expert, "W_out")

    @property
    def _held(self) -> Float[Tensor, "*place expert"]:
        assert self.gain is not None, "the routing is not held: call routed first"
        return self.gain

    def _place(self, width: int) -> Tensor:
        return self._held.new_zeros(*self._held.shape[:-1], width)

    def _stretches(self) -> Iterator[tuple[FeedForward, slice]]:
        start = 0
        for expert, size in zip(self.experts, self.sizes, strict=True):
            yield expert, slice(start, start + size)
            start += size

    def _each(self) -> Iterator[tuple[FeedForward, tuple[Tensor, ...], slice]]:
        """Yields the experts that are chosen, where, and their neurons."""
        gain = self._held
        used = (gain != 0).flatten(0, -2).any(dim=0).tolist()
        for index, (expert, columns) in enumerate(self._stretches()):
            if used[index]:
                mine = gain[..., index]
                rows = mine.nonzero(as_tuple=True)
                yield replace(expert, gain=mine[rows][:, None]), rows, columns


def _index(rows: tuple[Tensor, ...], *rest: Any) -> Any:
    return (*rows, *rest)


def _some(values: Sequence[Tensor], rows: tuple[Tensor, ...], columns: slice) -> list[Tensor]:
    """Returns some places of an expert's neurons; what is the same everywhere as it is."""
    return [one[_index(rows, ..., columns)] if one.ndim else one for one in values]
