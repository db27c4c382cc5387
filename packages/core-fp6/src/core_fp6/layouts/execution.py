"""The layout of kernels: what is unpacked together is where matrix units want it.

A row is cut into blocks of 256 columns, and a block into four parts of 64. Byte ``j`` of a block in
the high plane holds the two upper bits of place ``j`` of the four parts; in the low plane byte
``j`` holds the lower four bits of place ``j`` of parts 0 and 2, byte ``64+j`` those of parts 1
and 3. So one mask and one shift unpack a part of 64 columns in words of any width.

The place of a column in its part is the same column with its bits in another order: with
``column = 16b + 8e + 2q + h``, ``place = 16q + 4b + 2h + e`` (``b`` and ``q`` below 4, ``e`` and
``h`` below 2). That is how the fragments of ``mma`` and ``wgmma`` instructions for 16-bit operands
are laid out (PTX ISA, "Matrix Fragments for mma.m16n8k16"): the lane of a quad that holds columns
``2q, 2q+1, 2q+8, 2q+9`` of every 16 reads them as 16 neighbouring bytes, with the two columns of a
32-bit register 16 bits apart, so that no value moves to another lane.

Where the sign and the top of the exponent stand in a byte of the high plane depends on the format:
as far apart as in an FP8 E4M3 byte of the same value, so that a shift brings both there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from core_fp6.weights.numbers import E2M3, E3M2, Format

BLOCK = 256
"""Columns of a block."""
PART = 64
"""Columns of each of its four parts."""

UPPER: dict[Format, tuple[tuple[int, int], ...]] = {
    E3M2: ((7, 5), (6, 4), (3, 1), (2, 0)),
    E2M3: ((7, 4), (6, 3), (5, 2), (1, 0)),
}
"""For each part, which bits of a byte of the high plane are the sign and the top exponent bit."""


def planes_shape(columns: int) -> tuple[int, int]:
    """Bytes of a row in the low and in the high plane."""
    blocks = -(-columns // BLOCK)
    return 2 * PART * blocks, PART * blocks


def pack(codes: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Low plane ``[..., rows, 128b]`` and high plane ``[..., rows, 64b]`` of codes, all uint8.

    Args:
        codes: uint8 below 64, ``[..., rows, columns]``; ``b`` is columns / 256, rounded up.
        fmt: of the codes: E3M2 or E2M3.
    """
    filled = pad(codes, (0, -codes.shape[-1] % BLOCK))
    parts = torch.unflatten(to_places(filled), -1, (-1, 4, PART))
    lower = parts & 15
    low = lower[..., :2, :] | lower[..., 2:, :] << 4
    high = torch.zeros_like(parts[..., 0, :])
    for part, (sign, top) in enumerate(UPPER[fmt]):
        upper = parts[..., part, :]
        high |= (upper >> 5) << sign | (upper >> 4 & 1) << top
    return low.flatten(-3), high.flatten(-2)


def unpack(low: Tensor, high: Tensor, columns: int, fmt: Format) -> Tensor:
    """Codes ``[..., rows, columns]`` of the planes of :func:`pack`."""
    pairs = torch.unflatten(low, -1, (-1, 2, PART))
    lower = torch.cat((pairs & 15, pairs >> 4), -2)
    bytes_ = torch.unflatten(high, -1, (-1, PART))
    upper = [(bytes_ >> sign & 1) << 5 | (bytes_ >> top & 1) << 4 for sign, top in UPPER[fmt]]
    return to_columns((lower | torch.stack(upper, -2)).flatten(-3))[..., :columns]


def to_places(values: Tensor) -> Tensor:
    """Values ``[..., 64n]`` in the order of columns, put into the order of places."""
    b_e_q_h = torch.unflatten(values, -1, (-1, 4, 2, 4, 2))
    return b_e_q_h.movedim((-4, -3, -2, -1), (-3, -1, -4, -2)).flatten(-5)


def to_columns(values: Tensor) -> Tensor:
    """The inverse of :func:`to_places`."""
    q_b_h_e = torch.unflatten(values, -1, (-1, 4, 4, 2, 2))
    return q_b_h_e.movedim((-4, -3, -2, -1), (-2, -4, -1, -3)).flatten(-5)
