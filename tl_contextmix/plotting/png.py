"""A matrix as a small picture: one pixel per cell, eight bits, no imaging library."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from functools import cache

import torch
from jaxtyping import Float

from tl_contextmix.plotting import colors

STEPS = 126
_INFINITE = 2 * STEPS + 1
_NOTHING = 255


def data_uri(values: Float[torch.Tensor, "row column"], largest: float, side: int = 1) -> str:
    """Returns the picture of a matrix as a ``data:`` address.

    The colour is linear in the number, but the steps are not: small numbers differ visibly, too.

    Args:
        values: The matrix. NaN and infinities have colours of their own.
        largest: The absolute value with the deepest colour.
        side: How many pixels each cell is wide and high.
    """
    share = (values.double() / (largest or 1.0)).clamp(-1, 1).nan_to_num(0.0)
    indices = ((share.sign() * share.abs().sqrt() * STEPS).round() + STEPS).to(torch.uint8)
    indices[values.isinf()] = _INFINITE
    indices[values.isnan()] = _NOTHING
    indices = indices.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return "data:image/png;base64," + base64.b64encode(_encode(indices)).decode()


@cache
def palette() -> tuple[colors.Rgb, ...]:
    """Returns the colour of each index, no two of them alike: a script can read them back."""
    white = (255, 255, 255)
    offsets = sorted(itertools.product((0, 1, 2), repeat=3), key=sum)
    found: list[colors.Rgb] = []
    for index in range(-STEPS, STEPS + 1):
        red, green, blue = colors.shade((index / STEPS) * abs(index / STEPS))
        near = ((red - a, green - b, blue - c) for a, b, c in offsets)
        fresh = (shade for shade in near if shade != white and shade not in found)
        found.append(next(fresh) if index else white)
    orange, grey = map(colors.parse, (colors.INFINITE, colors.NOTHING))
    return (*found, orange, grey, grey)


def _encode(indices: torch.Tensor) -> bytes:
    height, width = indices.shape
    # Each line of a PNG begins with the number of its filter; 0 is none.
    pixels = torch.cat([indices.new_zeros(height, 1), indices], dim=1).numpy().tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"PLTE", b"".join(map(bytes, palette())))
        + _chunk(b"IDAT", zlib.compress(pixels, 6))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
