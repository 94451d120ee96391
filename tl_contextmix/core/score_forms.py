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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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


def fit_turns(
    pairs: Sequence[tuple[Float[Tensor, "head d_head"], Float[Tensor, "head d_head"]]],
    tolerance: float,
) -> list[Float[Tensor, "d_head d_head"]] | None:
    """Returns the rotations of the last dimensions that make one of each pair of the other.

    Dimensions are turned in pairs, of neighbours or of two halves, and put down as either; all
    pairs are turned and put down in the same way (latent attention).

    Args:
        pairs: Vectors of some heads before and after.
        tolerance: Largest error, relative to the largest number.
    """
    width = pairs[0][0].shape[1]
    for turned in range(width - width % 2, 0, -2):
        every = torch.arange(width - turned, width)
        halves = every[: turned // 2], every[turned // 2 :]
        neighbours = every[0::2], every[1::2]
        ways = [(a, b) for a in (halves, neighbours) for b in (halves, neighbours)]
        for read, put in ways if turned > 2 else ways[:1]:
            found = [_turn(*pair, read, put, tolerance) for pair in pairs]
            matrices = [matrix for matrix in found if matrix is not None]
            if len(matrices) == len(pairs):
                return matrices
    return None


Halves = tuple[Int[Tensor, " half"], Int[Tensor, " half"]]


def _turn(
    before: Tensor, after: Tensor, read: Halves, put: Halves, tolerance: float
) -> Tensor | None:
    """Returns the rotation between two vectors of each head, by least squares; None for none."""
    (a, b), (c, d) = (tuple(x[:, at] for at in some) for x, some in ((before, read), (after, put)))
    size = (a.square() + b.square()).sum(0).clamp(min=1e-30)
    cos, sin = (a * c + b * d).sum(0) / size, (a * d - b * c).sum(0) / size
    matrix = torch.eye(before.shape[1], dtype=before.dtype, device=before.device)
    matrix[torch.cat(read), torch.cat(read)] = 0
    matrix[read[0], put[0]], matrix[read[0], put[1]] = cos, sin
    matrix[read[1], put[0]], matrix[read[1], put[1]] = -sin, cos
    error = (before @ matrix - after).abs().max()
    return matrix if float(error) <= tolerance * float(after.abs().max()) else None
