"""A matrix as a small picture: one pixel per cell, eight bits, no imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from jaxtyping import Float

from tl_contextmix.plotting import colors

_STEPS = 127
_ZERO = 127
_NOTHING = 255


def data_uri(values: Float[torch.Tensor, "row column"], largest: float, side: int = 1) -> str:
    """Returns the picture of a matrix as a ``data:`` address.

    Args:
        values: The matrix. NaN is drawn as nothing; infinities take the colour of ``largest``.
        largest: The absolute value with the deepest colour.
        side: How many pixels each cell is wide and high.
    """
    scaled = (values.double() / (largest or 1.0)).clamp(-1, 1) * _STEPS
    indices = scaled.round().nan_to_num(0.0).to(torch.int64) + _ZERO
    indices[values.isnan()] = _NOTHING
    indices = indices.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return "data:image/png;base64," + base64.b64encode(_encode(indices)).decode()


def _encode(indices: torch.Tensor) -> bytes:
    height, width = indices.shape
    # Each line of a PNG begins with the number of its filter; 0 is none.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.int64), indices], dim=1)
    pixels = lines.to(torch.uint8).numpy().tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"PLTE", _palette())
        + _chunk(b"IDAT", zlib.compress(pixels, 9))
        + _chunk(b"IEND", b"")
    )


def _palette() -> bytes:
    shades = [colors.shade((index - _ZERO) / _STEPS) for index in range(_NOTHING)]
    nothing = bytes.fromhex(colors.NOTHING[1:])
    return b"".join(bytes(shade) for shade in shades) + nothing


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
