"""A matrix as a small picture: one pixel per cell, eight bits, no imaging library."""

from __future__ import annotations

import base64
import struct
import zlib
from functools import cache

import torch
from jaxtyping import Float

from tl_contextmix.plotting import colors

STEPS = 126
_INFINITE = 2 * STEPS + 1
_NOTHING = 255


def data_uri(depths: Float[torch.Tensor, "row column"], side: int = 1) -> str:
    """Returns the picture of a matrix as a ``data:`` address.

    Args:
        depths: Colours from -1 to 1, see `scales.depths`. NaN and infinities have colours of their
            own.
        side: How many pixels each cell is wide and high.
    """
    share = depths.double().clamp(-1, 1).nan_to_num(0.0)
    indices = ((share * STEPS).round() + STEPS).to(torch.uint8)
    indices[depths.isinf()] = _INFINITE
    indices[depths.isnan()] = _NOTHING
    indices = indices.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return "data:image/png;base64," + base64.b64encode(_encode(indices)).decode()


@cache
def palette() -> tuple[colors.Rgb, ...]:
    """Returns the colour of each index."""
    shades = (colors.shade(index / STEPS) for index in range(-STEPS, STEPS + 1))
    orange, grey = map(colors.parse, (colors.INFINITE, colors.NOTHING))
    return (*shades, orange, grey, grey)


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
