"""The layout on disk: two planes in natural order, the same on every device.

The low plane holds the four lower bits of two neighbouring codes in a byte, the first one in the
low half; the high plane holds the two upper bits of four, the first ones lowest. A row is filled up
to a multiple of four columns with code 0. Both planes can be cut at every fourth column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

VERSION = 1
"""Number of this layout in configuration files."""
STEP = 4
"""Columns that share bytes."""


def planes_shape(columns: int) -> tuple[int, int]:
    """Bytes of a row in the low and in the high plane."""
    high = -(-columns // STEP)
    return 2 * high, high


def pack(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Low plane ``[..., rows, 2k]`` and high plane ``[..., rows, k]`` of codes, all uint8.

    Args:
        codes: uint8 below 64, ``[..., rows, columns]``; ``k`` is columns / 4, rounded up.
    """
    c = pad(codes, (0, -codes.shape[-1] % STEP))
    c = c.view(*c.shape[:-1], c.shape[-1] // STEP, STEP)
    low = (c[..., 0::2] & 15) | (c[..., 1::2] << 4)
    upper = c >> 4
    high = upper[..., 0] | upper[..., 1] << 2 | upper[..., 2] << 4 | upper[..., 3] << 6
    return low.flatten(-2), high


def unpack(low: Tensor, high: Tensor, columns: int) -> Tensor:
    """Codes ``[..., rows, columns]`` of the planes of :func:`pack`."""
    lower = torch.stack((low & 15, low >> 4), -1).flatten(-2)
    upper = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    return (lower | upper << 4)[..., :columns]
