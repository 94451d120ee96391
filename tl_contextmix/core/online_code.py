r"""Minimum description length of labels by online coding (Voita & Titov 2020, section 2.2.2).

.. math::

    L = t_1 \log_2 K - \sum_{i=1}^{S-1} \log_2 p_{\theta_i}(y_{t_i+1:t_{i+1}} \mid
    x_{t_i+1:t_{i+1}})

The first examples are sent with a uniform code for ``K`` classes, every further stretch with a
probe trained on all examples before it. Many codes of the same examples, in orders and with labels
of their own, are computed at once: their losses are summed and share no parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FRACTIONS = (0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Where stretches end, of all examples: those of Mohebbi et al. (2023)."""
# A linear probe's loss has one minimum, which is found; a hidden layer's is followed for so long.
_STEPS = {"linear": 500, "hidden": 100}
# Bound for each number of the gradient of the penalised sum over examples, in nats: with a penalty
# of 1, a linear probe's loss is within half of the gradient's squared length of its minimum.
_GRADIENT = 1e-3


def stretch_ends(count: int) -> tuple[int, ...]:
    """Returns after how many examples each stretch ends; empty stretches are left out."""
    return tuple(sorted({max(1, round(count * fraction)) for fraction in FRACTIONS}))


def online_code(
    x: Float[Tensor, "example d_model"],
    labels: Int[Tensor, "code example"],
    orders: Int[Tensor, "code example"],
    classes: int,
    *,
    ends: Sequence[int],
    hidden: int | None,
    penalty: float,
    seeds: Sequence[int],
) -> tuple[Float[Tensor, " code"], Float[Tensor, " code"]]:
    """Returns the length of each code in bits, and the accuracy on the last stretch.

    Args:
        x: What the probes read, on the scale they read it.
        labels: Classes from 0.
        orders: The order in which the examples are sent.
        classes: How many classes there are.
        ends: After how many examples each stretch ends.
        hidden: Units of a probe's hidden layer (ReLU); None: a linear probe.
        penalty: Half of this times the squared size of a probe's parameters, biases included, is
            added to its summed loss in nats.
        seeds: Of the first weights of each code's probes, where there is a hidden layer.
    """
    # Also right when called under no_grad or inference_mode.
    with torch.inference_mode(False):
        x, labels, orders = (one.clone().to(x.device) for one in (x, labels, orders))
        one_hot = torch.nn.functional.one_hot(labels, classes).to(x)
        rank = orders.argsort(dim=1)
    bits = x.new_full((len(labels),), ends[0] * math.log2(classes))
    accuracy = torch.full_like(bits, torch.nan)
    for start, stop in itertools.pairwise(ends):
        with torch.inference_mode(False), torch.enable_grad():
            probes = _first_weights(x, classes, hidden, seeds)
            _fit(probes, x, one_hot, rank < start, penalty)
        sent = (rank >= start) & (rank < stop)
        with torch.no_grad():
            logits = _logits(probes, x)
            bits = bits + (_losses(logits, one_hot) * sent).sum(1) / math.log(2)
            accuracy = ((logits.argmax(-1) == labels) & sent).sum(1).to(x) / (stop - start)
    return bits, accuracy


def _first_weights(
    x: Tensor, classes: int, hidden: int | None, seeds: Sequence[int]
) -> list[Tensor]:
    """Returns weights and biases of each layer: zeros, or drawn where there is a hidden one."""
    sizes = [x.shape[1], classes] if hidden is None else [x.shape[1], hidden, classes]
    found = []
    for place, (into, out) in enumerate(itertools.pairwise(sizes)):
        weight = torch.zeros(len(seeds), into, out, dtype=torch.float64)
        for code, seed in enumerate(seeds if hidden is not None else ()):
            generator = torch.Generator().manual_seed(2 * seed + place)
            drawn = torch.randn(into, out, generator=generator, dtype=torch.float64)
            weight[code] = drawn / math.sqrt(into)
        found += [weight.to(x), x.new_zeros(len(seeds), 1, out)]
    return [one.requires_grad_() for one in found]


def _logits(
    probes: Sequence[Tensor], x: Float[Tensor, "example d_model"]
) -> Float[Tensor, "code example class"]:
    found = x @ probes[0] + probes[1]
    return found if len(probes) == 2 else found.relu() @ probes[2] + probes[3]


def _losses(logits: Tensor, one_hot: Tensor) -> Float[Tensor, "code example"]:
    # No index: its gradient has no fixed order on CUDA.
    return -(logits.log_softmax(-1) * one_hot).sum(-1)


def _fit(
    probes: Sequence[Tensor],
    x: Tensor,
    one_hot: Tensor,
    seen: Bool[Tensor, "code example"],
    penalty: float,
) -> None:
    """Minimises the loss on what each code has seen, in place."""
    some = seen.any(dim=0)
    x, one_hot, weights = x[some], one_hot[:, some], seen[:, some].to(x)
    optimizer = torch.optim.LBFGS(
        [*probes],
        max_iter=_STEPS["linear" if len(probes) == 2 else "hidden"],
        tolerance_grad=_GRADIENT,
        tolerance_change=torch.finfo(x.dtype).tiny,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        size = torch.stack([parameter.square().sum() for parameter in probes]).sum()
        result = (_losses(_logits(probes, x), one_hot) * weights).sum() + penalty / 2 * size
        result.backward()
        return result

    optimizer.step(loss)
