"""The packing of FP6-LLM's kernels (TC-FPx), for files that were made for them and for those kernels.

First the plane of two upper bits, then the plane of four lower bits, each in the order in which the
lanes of a warp feed ``mma.m16n8k16``: tiles of 64 rows and 16 columns, in them the row halves and
quarters, 32 lanes, and the values of a lane (FP6-LLM, arXiv 2401.14112, section 5.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import ModelError

ROWS = 64
COLUMNS = 64
"""Rows and columns have to be multiples of these."""


def pack(codes: Tensor) -> Tensor:
    """Bytes of both planes, uint8 ``[rows * columns * 6 / 8]``.

    Args:
        codes: uint8 below 64, ``[rows, columns]``.

    Raises:
        ModelError: when rows or columns are not multiples of 64.
    """
    rows, columns = codes.shape
    _require_tiles(rows, columns)
    cut = codes.reshape(rows // 64, 2, 2, 2, 8, columns // 16, 2, 4, 2)
    # Rows 8 to 15 of a fragment come before rows 0 to 7.
    tiles, half, quarter, eighth, row, column, group, pair, one = range(9)
    cut = cut.flip(eighth)
    lanes = (tiles, column, half, quarter, row, pair, one, eighth, group)
    nibbles = (cut & 15).permute(lanes).reshape(-1, 2)
    low = nibbles[:, 0] << 4 | nibbles[:, 1]
    lanes = (tiles, column, half, row, pair, one, eighth, quarter, group)
    fields = (cut >> 4).permute(lanes).reshape(-1, 4)
    high = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
    return torch.cat((high, low))


def unpack(data: Tensor, rows: int, columns: int) -> Tensor:
    """Codes uint8 ``[rows, columns]`` of the bytes that :func:`pack` makes.

    Raises:
        ModelError: when rows or columns are not multiples of 64, or the bytes are of another size.
    """
    _require_tiles(rows, columns)
    octets = data.contiguous().view(torch.uint8).reshape(-1)
    if octets.numel() != rows * columns * 6 // 8:
        raise ModelError(
            f"these are no {rows} x {columns} weights of TC-FPx",
            why=f"{octets.numel()} bytes instead of {rows * columns * 6 // 8}",
            fix="give the rows and columns of the layer",
        )
    high, low = octets[: rows * columns // 4], octets[rows * columns // 4 :]
    nibbles = torch.stack((low >> 4, low & 15), -1)
    lower = nibbles.reshape(rows // 64, columns // 16, 2, 2, 8, 4, 2, 2, 2)
    fields = torch.stack([(high >> shift) & 3 for shift in (6, 4, 2, 0)], -1)
    upper = fields.reshape(rows // 64, columns // 16, 2, 8, 4, 2, 2, 2, 2)
    # Both back to: tiles, half, quarter, eighth, row, column, group, pair, one.
    codes = lower.permute(0, 2, 3, 7, 4, 1, 8, 5, 6) | upper.permute(0, 2, 7, 6, 3, 1, 8, 4, 5) << 4
    return codes.flip(3).reshape(rows, columns)


def _require_tiles(rows: int, columns: int) -> None:
    if rows % ROWS or columns % COLUMNS:
        raise ModelError(
            f"TC-FPx cannot pack {rows} x {columns} weights",
            why=f"rows go by {ROWS} and columns by {COLUMNS}",
            fix="keep this layer in another layout",
        )
