r"""An attention score as a bilinear form of what its head reads.

Before the softmax, and before a soft cap if there is one,

.. math:: s = \hat q^\top M \hat k + p, \qquad
          \hat q = \frac{(x_i W_Q + b_Q)\,\gamma_q}{\sigma_q}, \qquad
          \hat k = \frac{(x_j W_K + b_K)\,\gamma_k}{\sigma_k}

with :math:`\gamma` and :math:`\sigma` the gains and scales of norms of queries and keys (1 without
one), :math:`M` the factor of the scores and the rotation between the two positions, and :math:`p`
what positions add (ALiBi, relative biases). No host is asked for :math:`M` and :math:`p`: they are
fitted to scores of known queries and keys, and what does not fit is no such form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.token_sums import Norm

Vectors = Float[Tensor, "some d_head"]


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys.

    Attributes:
        norm: The norm, without its gain.
        gain: Its gain.
        together: Whether all heads share one scale (OLMo 2), not each its own.
    """

    norm: Norm
    gain: Float[Tensor, "#head d_head"]
    together: bool

    def scale(self, x: Float[Tensor, "*place head d_head"]) -> Float[Tensor, "*place head 1"]:
        """Returns its divisor of each head."""
        if not self.together:
            return self.norm.scale(x)
        return self.norm.scale(x.flatten(-2))[..., None].expand(*x.shape[:-1], 1)

    def linear(self, x: Float[Tensor, "*place head d_head"]) -> Float[Tensor, "*place head d_head"]:
        """Returns what distributes over sums, still to be divided by a scale.

        One scale for all heads is that of an RMSNorm: there is no mean to take off.
        """
        return self.norm.centre(x) * self.gain

    def __call__(self, x: Float[Tensor, "*place head d_head"]) -> Tensor:
        """Returns the norm of queries or keys."""
        return self.linear(x) / self.scale(x)


def fit_form(
    query: Vectors, key: Vectors, scores: Float[Tensor, " some"], tolerance: float
) -> Float[Tensor, "d_head d_head"] | None:
    """Returns the matrix of a form, given what it makes of some queries and keys; None for none.

    Tried are a multiple of the identity, rotations of pairs of the first dimensions (neighbours, or
    those of two halves), and any map of such pairs: a gain after the rotation (Hunyuan). What has
    fewer equations than half as many again as unknowns is not tried.

    Args:
        query: Queries, normed.
        key: Keys, normed, one for each query.
        scores: Scores, without what positions add.
        tolerance: Largest error, relative to the largest score.
    """
    query, key, scores = (x.double().cpu() for x in (query, key, scores))
    width = query.shape[1]
    for columns in _columns(width):
        if 2 * len(scores) < 3 * len(columns):
            continue
        table = torch.stack(
            [sum(sign * query[:, a] * key[:, b] for a, b, sign in one).sum(-1) for one in columns],  # type: ignore[union-attr]
            dim=1,
        )
        found = torch.linalg.lstsq(table, scores[:, None]).solution[:, 0]
        if float((table @ found - scores).abs().max()) <= tolerance * float(scores.abs().max()):
            matrix = query.new_zeros(width, width)
            for value, one in zip(found, columns, strict=True):
                for a, b, sign in one:
                    matrix[a, b] += sign * value
            return matrix
    return None


Column = list[tuple[Tensor, Tensor, int]]


def _columns(width: int) -> Iterator[list[Column]]:
    """Yields what the unknowns of a form multiply: places of queries, of keys, and a sign."""
    every = torch.arange(width)
    yield [[(every, every, 1)]]
    for free in (False, True):
        for turned in range(width - width % 2, 0, -2):
            halves = every[: turned // 2], every[turned // 2 : turned]
            neighbours = every[0:turned:2], every[1:turned:2]
            for first, second in [halves] if turned == 2 else [halves, neighbours]:
                rest = every[turned:]
                pairs = [
                    one
                    for a, b in zip(first[:, None], second[:, None], strict=True)
                    for one in _pair(a, b, free)
                ]
                if free:
                    yield pairs + [[(x, x, 1)] for x in rest[:, None]]
                else:
                    yield pairs + ([[(rest, rest, 1)]] if len(rest) else [])


def _pair(a: Tensor, b: Tensor, free: bool) -> list[Column]:
    if free:
        return [[(a, a, 1)], [(b, b, 1)], [(a, b, 1)], [(b, a, 1)]]
    return [[(a, a, 1), (b, b, 1)], [(a, b, 1), (b, a, -1)]]
