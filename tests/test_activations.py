"""Closed-form path integrals against quadrature and captum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tl_contextmix.core.activations import ACTIVATIONS, Activation, gated_slopes

pytestmark = pytest.mark.once

NAMES = {activation.name: activation for activation in ACTIVATIONS}
# What captum is asked about: the activations of the families.
CAPTUM = ["gelu", "gelu_new", "relu", "silu"]


@pytest.fixture
def ends() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-9, 1e-3, 1.0, 5.0, 30.0], dtype=torch.float64)
    draw = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64) * scales[:, None]
    start, end = draw[0].flatten(), draw[1].flip(0).flatten()
    end[:5], start[:5] = 0.0, 0.0
    end[5:10] = start[5:10]
    return start, end


def midpoint(function, start: Tensor, end: Tensor) -> Tensor:
    alpha = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return torch.stack(
        [function(s + alpha * (e - s)).mean() for s, e in zip(start, end, strict=True)]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_secants_add_up_to_the_change(activation: Activation, ends) -> None:
    start, end = ends
    zero = activation(torch.zeros_like(end))
    from_zero = activation.secant(None, end) * end + zero
    from_start = activation.secant(start, end) * (end - start) + activation(start)
    # Rounding of values up to relu2(100) = 1e4; xIELU jumps by 8e-7 at zero in its definition,
    # which no slope over a step below 1.5e-8 can hold.
    atol = 2e-6 if activation.name == "xielu" else 1e-11
    torch.testing.assert_close(from_zero, activation(end), atol=atol, rtol=1e-12)
    torch.testing.assert_close(from_start, activation(end), atol=atol, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_secant_is_the_mean_derivative_along_the_path(activation: Activation, ends) -> None:
    start, end = (x[40:160:6] for x in ends)
    expected = midpoint(activation.derivative, start, end)
    # The midpoint rule misplaces a kink by half a step (jump 1 x 1/40000) and xIELU's jump of
    # its value (8e-7) has no derivative at all.
    atol = 1e-3 if activation.name == "xielu" else 3e-5 if activation.kink else 1e-8
    torch.testing.assert_close(activation.secant(start, end), expected, atol=atol, rtol=0)
    expected = midpoint(activation.derivative, torch.zeros_like(end), end)
    torch.testing.assert_close(activation.secant(None, end), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_path_mean_is_the_mean_along_the_path(activation: Activation, ends) -> None:
    start, end = (x[::7] for x in ends)
    for first in (start, None):
        begin = torch.zeros_like(end) if first is None else first
        expected = midpoint(activation.function, begin, end)
        # 4e-7: the midpoint rule's own error for paths of length 100 across a bend.
        torch.testing.assert_close(activation.path_mean(first, end), expected, atol=4e-7, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_gated_slopes_add_up_and_match_quadrature(activation: Activation, ends) -> None:
    start, end = ends
    linear = torch.linspace(-3, 3, end.numel(), dtype=torch.float64)
    for gate_start, linear_start in ((start, linear.flip(0)), (None, None)):
        mean, slope = gated_slopes(activation, (gate_start, end), (linear_start, linear))
        g0 = torch.zeros_like(end) if gate_start is None else gate_start
        u0 = torch.zeros_like(end) if linear_start is None else linear_start
        gained = mean * (linear - u0) + slope * (end - g0)
        expected = activation(end) * linear - activation(g0) * u0
        atol = 1e-5 if activation.name == "xielu" else 1e-10
        torch.testing.assert_close(gained, expected, atol=atol, rtol=1e-12)
    if activation.kink:
        return
    some = slice(40, 160, 6)
    steps = 4000
    alpha = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)[:, None]
    path = start[some] + alpha * (end - start)[some]
    moving = linear.flip(0)[some] + alpha * (linear - linear.flip(0))[some]
    expected = (activation.derivative(path) * moving).mean(0)
    _, slope = gated_slopes(activation, (start, end), (linear.flip(0), linear))
    torch.testing.assert_close(slope[some], expected, atol=1e-5, rtol=1e-5)


def test_relu_gate_splits_in_halves() -> None:
    """For zero origin and an open ReLU gate, f = G U is bilinear: Shapley's half and half."""
    gate, linear = torch.tensor([2.0, 3.0, -1.0]), torch.tensor([5.0, -7.0, 4.0])
    mean, slope = gated_slopes(NAMES["relu"], (None, gate), (None, linear))
    torch.testing.assert_close(mean, torch.tensor([1.0, 1.5, 0.0]))
    torch.testing.assert_close(slope, torch.tensor([2.5, -3.5, 0.0]))


def test_identity_is_linear() -> None:
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(NAMES["identity"].secant(None, x), torch.ones(9))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", CAPTUM)
def test_whole_feed_forward_against_captum(name: str, gated: bool) -> None:
    """Integrated gradients of captum on a biased feed-forward block with n parts and a bias part.

    Contributors are the parts, the bias entering the block, and the block's own input biases,
    which a factor t carries from 0 to 1.
    """
    captum = pytest.importorskip("captum.attr")
    activation = NAMES[name]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, d, m = 3, 6, 10
    parts, W_in, b_in, W_out = draw(n + 1, d), draw(d, m), draw(m), draw(m, d)
    W_gate, b_gate = draw(d, m), draw(m)

    def block(flat: Tensor, t: Tensor) -> Tensor:
        x = flat.view(-1, n + 1, d).sum(1)
        pre, linear = x @ W_in + t * b_in, x @ W_gate + t * b_gate
        return (activation(pre) * linear if gated else activation(pre)) @ W_out

    explain = captum.IntegratedGradients(block)
    inputs = (parts.reshape(1, -1), torch.ones(1, 1, dtype=torch.float64))
    expected, shares_of_bias = [], []
    for out in range(d):
        # From zero, biases carried along, no unit crosses zero on the way: 300 steps are plenty.
        first, second = explain.attribute(inputs, target=out, n_steps=300)
        expected.append(first.view(n + 1, d).sum(1))
        shares_of_bias.append(second.sum())
    expected = torch.stack(expected, dim=1)

    branches = ((W_in, b_in), (W_gate, b_gate)) if gated else ((W_in, b_in),)
    shares = [parts @ weight for weight, _ in branches]
    totals = [share.sum(0) + bias for share, (_, bias) in zip(shares, branches, strict=True)]
    if gated:
        linear_slope, gate_slope = gated_slopes(activation, (None, totals[0]), (None, totals[1]))
        slopes = [gate_slope, linear_slope]
    else:
        slopes = [activation.secant(None, totals[0])]
    ours = torch.stack([s * r for s, r in zip(shares, slopes, strict=True)]).sum(0) @ W_out
    constants = [b * r for (_, b), r in zip(branches, slopes, strict=True)]
    bias = torch.stack(constants).sum(0) @ W_out
    scale = expected.abs().max()
    bound = 1e-6
    assert float((ours - expected).abs().max() / scale) <= bound
    assert float((bias - torch.stack(shares_of_bias)).abs().max() / scale) <= bound
