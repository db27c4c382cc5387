"""Four codes in three bytes, as files of others have them.

FP6-LLM writes the first code into the top bits of the first byte; packed MXFP6 has it lowest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from core.errors import ModelError

First = Literal["high", "low"]


def pack(codes: Tensor, first: First) -> Tensor:
    """Bytes ``[..., columns * 3 / 4]`` of uint8 codes ``[..., columns]``.

    Args:
        codes: below 64.
        first: where the first of four codes lies in its three bytes.

    Raises:
        ModelError: when the columns are not a multiple of four.
    """
    if codes.shape[-1] % 4:
        raise ModelError(
            f"{codes.shape[-1]} columns do not fill three bytes with four codes each",
            fix="fill the rows up with code 0",
        )
    a, b, c, d = codes.reshape(*codes.shape[:-1], -1, 4).unbind(-1)
    if first == "high":
        octets = (a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d)
    else:
        octets = (a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2)
    return torch.stack(octets, -1).flatten(-2)


def unpack(data: Tensor, first: First) -> Tensor:
    """Codes uint8 ``[..., bytes * 4 / 3]`` of uint8 ``[..., bytes]``.

    Raises:
        ModelError: when the bytes are not a multiple of three.
    """
    if data.shape[-1] % 3:
        raise ModelError(f"rows of {data.shape[-1]} bytes do not hold four codes in three each")
    a, b, c = data.reshape(*data.shape[:-1], -1, 3).unbind(-1)
    if first == "high":
        codes = (a >> 2, (a & 3) << 4 | b >> 4, (b & 15) << 2 | c >> 6, c & 63)
    else:
        codes = (a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2)
    return torch.stack(codes, -1).flatten(-2)
