r"""Elementwise activations and their exact path integrals.

A feed-forward unit reads :math:`z = \sum_j p_j`. Integrated gradients of :math:`g(z)` along the
straight path from ``start`` to ``end`` give each summand :math:`p_j` the same *secant slope*

.. math:: r = \int_0^1 g'(s + \alpha (e - s)) d\alpha = \frac{g(e) - g(s)}{e - s},

so no quadrature over the path is needed (Kobayashi et al. 2024, eq. 12 with baseline 0; the slope
is also DecompX' eq. 10). A gated unit :math:`g(G)\,U` has two slopes, one for each branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy
import torch
from torch import Tensor
from torch.nn import functional

# Below this distance g(e) - g(s) loses digits to cancellation (at 0.1 a float64 secant keeps
# 1e-15 / 0.1 = 1e-14 of slope), and above it Gauss-Legendre on g' would need more nodes. Kinked
# activations keep the division down to the square root of the machine precision: it stays exact
# across a kink, and their branches are simple enough not to cancel.
_NEAR_SMOOTH = 0.1


@dataclass(frozen=True)
class Activation:
    """An elementwise activation.

    Attributes:
        name: Name in the field's spelling.
        function: The activation itself.
        gate: For activations of the form ``x F(x)``: the function ``F``, which is then the secant
            slope from zero in closed form, without a division that fails at zero.
        tail: For those with ``F(x) + F(-x) = 1``: beyond this distance from zero the activation
            is ``relu`` to the last digit of float64. None for every other activation.
        integral: An antiderivative in closed form, where there is one.
        kink: Whether a derivative jumps at zero.
        silent: Whether it is exactly zero over a stretch, as ReLU is below zero.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    tail: float | None = None
    integral: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    kink: bool = False
    silent: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the activation of every element."""
        return self.function(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Returns the derivative at every element."""
        # Also right when called under no_grad or inference_mode.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.function(x).sum(), x)[0]

    def secant(self, start: Tensor | None, end: Tensor) -> Tensor:
        """Returns ``(g(end) - g(start)) / (end - start)``, its limit where they meet.

        Args:
            start: Where the path starts; None for zero.
            end: Where it ends.
        """
        if start is None:
            if self.gate is not None:
                return self.gate(end)
            start = end.new_zeros(()).expand_as(end)
        _, near, divisor = self._split(start, end)

        def mean(start: Tensor, end: Tensor) -> Tensor:
            step = end - start
            return _path_mean(lambda alpha: self.derivative(start + alpha * step), start, end, 8)

        return _patch((self(end) - self(start)) / divisor, near, mean, start, end)

    def _split(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the step, where it is too short to divide by, and a safe divisor."""
        step = end - start
        limit = torch.finfo(step.dtype).eps ** 0.5 if self.kink else _NEAR_SMOOTH
        near = step.abs() < limit
        return step, near, torch.where(near, torch.ones_like(step), step)

    def path_mean(self, start: Tensor | None, end: Tensor) -> Tensor:
        r"""Returns :math:`\int_0^1 g(s + \alpha (e - s)) d\alpha`, the mean along the path.

        Exact for activations that approach ``relu`` (closed form plus 32 nodes over the part where
        they differ: relative error 1e-13); 32-point Gauss-Legendre on either side of zero for the
        others.

        Args:
            start: Where the path starts; None for zero.
            end: Where it ends.
        """
        at_zero = start is None
        start = end.new_zeros(()).expand_as(end) if start is None else start

        def along(nodes: int, start: Tensor, end: Tensor) -> Tensor:
            step = end - start
            return _path_mean(lambda alpha: self(start + alpha * step), start, end, nodes)

        if self.tail is None and self.integral is None:
            return along(32, start, end)
        _, near, divisor = self._split(start, end)
        before = self._antiderivative(end.new_zeros(()) if at_zero else start)
        far = (self._antiderivative(end) - before) / divisor
        return _patch(far, near, partial(along, 8), start, end)

    def _antiderivative(self, x: Tensor) -> Tensor:
        """Returns an antiderivative, in closed form or as relu's less what is missing to relu.

        ``relu(x) - g(x)`` is even where F(x) + F(-x) = 1, and vanishes beyond the tail: on a
        bounded interval 32 nodes reach float64, while on [0, x] they would not for large x.
        """
        if self.integral is not None:
            return self.integral(x)
        if not self.tail:
            return functional.relu(x).square() / 2
        reach = x.abs().clamp(max=self.tail)
        zero = torch.zeros_like(reach)
        gap = _path_mean(lambda a: a * reach - self(a * reach), zero, reach, 32) * reach
        return functional.relu(x).square() / 2 - torch.sign(x) * gap


def gated_slopes(
    activation: Activation,
    gate: tuple[Tensor | None, Tensor],
    linear: tuple[Tensor | None, Tensor],
    bounds: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns the slopes of ``g(G) U`` for summands of ``U`` and for summands of ``G``.

    With both branches moved together from start to end, a source whose summands are
    :math:`u_j` and :math:`g_j` receives :math:`u_j A_1 + g_j A_2`,

    .. math::
        A_1 = \int_0^1 g(G_s + \alpha \Delta G) d\alpha, \qquad
        A_2 = \frac{g(G_e) U_e - g(G_s) U_s - A_1 \Delta U}{\Delta G}.

    The sum over sources is exact whatever the error of :math:`A_1`. At :math:`\Delta G = 0` the
    limit :math:`A_2 = g'(G)(U_s + U_e) / 2` is taken. Where U is cut off, its summands count along
    the part of the path on which it is not.

    Args:
        activation: The activation of the gate branch.
        gate: Start (None for zero) and end of the gate branch.
        linear: Start (None for zero) and end of the linear branch.
        bounds: Between which the linear branch is cut off, or None.
    """
    begin, end = gate
    nothing = end.new_zeros(()).expand_as(end)
    start = nothing if begin is None else begin
    linear_start = nothing if linear[0] is None else linear[0]
    _, near, divisor = activation._split(start, end)
    if bounds is None:
        mean = activation.path_mean(begin, end)
        gained = activation(end) * linear[1] - activation(start) * linear_start
    else:
        first, last = _inside(linear_start, linear[1], bounds)
        step = end - start
        mean = (last - first) * activation.path_mean(start + first * step, start + last * step)
        gained = activation(end) * linear[1].clamp(*bounds)
        gained = gained - activation(start) * linear_start.clamp(*bounds)
    far = (gained - mean * (linear[1] - linear_start)) / divisor

    def limit(start: Tensor, end: Tensor, linear_start: Tensor, linear_end: Tensor) -> Tensor:
        def integrand(alpha: Tensor) -> Tensor:
            moving = linear_start + alpha * (linear_end - linear_start)
            moving = moving if bounds is None else moving.clamp(*bounds)
            return activation.derivative(start + alpha * (end - start)) * moving

        return _path_mean(integrand, start, end, 8)

    return mean, _patch(far, near, limit, start, end, linear_start, linear[1])


def _inside(start: Tensor, end: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Returns where straight paths enter bounds and leave them, as shares of their length."""
    step = end - start
    still = step == 0
    divisor = torch.where(still, torch.ones_like(step), step)
    crossings = [((bound - start) / divisor).clamp(0, 1) for bound in bounds]
    first, last = torch.minimum(*crossings), torch.maximum(*crossings)
    within = ((start > bounds[0]) & (start < bounds[1])).to(step)
    return first.masked_fill(still, 0), torch.where(still, within, last)


def clamped(activation: Activation, limit: float) -> Activation:
    """Returns an activation of inputs that are cut off above a limit."""
    top = activation(torch.tensor(limit, dtype=torch.float64)).item()

    def integral(x: Tensor) -> Tensor:
        return activation._antiderivative(x.clamp(max=limit)) + top * functional.relu(x - limit)

    return Activation(
        f"{activation.name} up to {limit:g}",
        lambda x: activation(x.clamp(max=limit)),
        integral=integral,
        kink=True,
    )


def swish(slope: float) -> Activation:
    """Returns ``x sigmoid(slope x)``."""
    return Activation(
        f"swish of {slope:g}",
        lambda x: x * torch.sigmoid(slope * x),
        gate=lambda x: torch.sigmoid(slope * x),
        tail=46.0 / slope,
    )


def _patch(
    found: Tensor, near: Tensor, compute: Callable[..., Tensor], *arguments: Tensor
) -> Tensor:
    """Returns ``found`` with the elements where ``near`` is true computed in the other way.

    Few are near, and the other way is a quadrature: computing it for all took a tenth of the time
    of a gated block. A GPU would be waited for to be asked which.
    """
    if near.device.type != "cpu":
        return torch.where(near, compute(*arguments), found)
    if bool(near.any()):
        found[near] = compute(*(argument[near] for argument in arguments))
    return found


def _path_mean(
    integrand: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, nodes: int
) -> Tensor:
    """Returns the integral over alpha in [0, 1], taken on either side of the crossing of zero.

    Kinks of the activations TransformerLens knows are all at zero, and Gauss-Legendre is exact
    to its order only where the function is smooth. A path that does not cross zero has one side
    of length 0.
    """
    length = end - start
    divisor = torch.where(length == 0, torch.ones_like(length), length)
    crossing = (-start / divisor).clamp(0, 1)
    # A GPU would be waited for.
    crosses = crossing.device.type != "cpu" or bool(crossing.any())
    total = torch.zeros_like(length)
    for node, weight in _nodes(nodes):
        total = total + weight * (1 - crossing) * integrand(crossing + node * (1 - crossing))
        if crosses:
            total = total + weight * crossing * integrand(node * crossing)
    return total


@lru_cache
def _nodes(count: int) -> tuple[tuple[float, float], ...]:
    """Returns Gauss-Legendre nodes and weights on [0, 1]."""
    x, w = numpy.polynomial.legendre.leggauss(count)
    return tuple(zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


def _tanh_cdf(x: Tensor) -> Tensor:
    # The tanh approximation is x times this, which keeps its slope at zero exact. In place, as it
    # is what replayed blocks spend most of their time on besides products.
    slope = math.sqrt(8 / math.pi)
    return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_()


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _xielu(x: Tensor) -> Tensor:
    # Fixed-parameter xIELU (arXiv 2411.13010) as TransformerLens has it: alpha 0.8, beta 0.5.
    negative = torch.expm1(x.clamp(max=-1e-6)) - x
    return torch.where(x > 0, 0.8 * x * x, 0.8 * negative) + 0.5 * x


ACTIVATIONS: tuple[Activation, ...] = (
    Activation("gelu", functional.gelu, gate=torch.special.ndtr, tail=9.0),
    Activation("gelu_new", lambda x: x * _tanh_cdf(x), gate=_tanh_cdf, tail=9.0),
    Activation("silu", functional.silu, gate=torch.sigmoid, tail=45.0),
    Activation("relu", functional.relu, gate=_step, tail=0.0, kink=True, silent=True),
    Activation(
        "relu2",
        lambda x: functional.relu(x) ** 2,
        gate=functional.relu,
        kink=True,
        silent=True,
    ),
    Activation(
        "quick_gelu",
        lambda x: x * torch.sigmoid(1.702 * x),
        gate=lambda x: torch.sigmoid(1.702 * x),
        tail=27.0,
    ),
    Activation("xielu", _xielu, kink=True),
    Activation("tanh", torch.tanh, integral=lambda x: x.abs() + functional.softplus(-2 * x.abs())),
    Activation("sigmoid", torch.sigmoid, integral=functional.softplus),
    Activation("softplus", functional.softplus),
    Activation("elu", functional.elu, kink=True),
    Activation("leaky_relu", functional.leaky_relu, kink=True),
    Activation("identity", lambda x: x, gate=torch.ones_like),
)
"""Every elementwise activation TransformerLens knows (gelu_fast and gelu_pytorch_tanh are
gelu_new up to rounding; relu at its kink has the slope 0), and the usual others. SoLU is not here:
it is a softmax over the whole layer, so no slope per unit exists."""
