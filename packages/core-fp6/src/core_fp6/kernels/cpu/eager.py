"""The products in torch, a few rows at a time, so that a weight is never there in full."""

from __future__ import annotations

import torch
from torch import Tensor

from core.native import Variant
from core_fp6.layouts.execution import BLOCK, planes_shape
from core_fp6.weights.packed import Packed

_ROWS = 1024
"""Rows of a block at a time: in float32, with their codes and indices, a few MB."""


class Eager:
    """The last resort: for processors and systems without a C compiler."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """See :func:`core_fp6.kernels.cpu.linear`."""
        return linear(x, weight, bias)

    def dequantize(self, weight: Packed, dtype: torch.dtype) -> Tensor:
        """See :func:`core_fp6.kernels.cpu.dequantize`."""
        return dequantize(weight, dtype)


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, or float64 for such input, rounded once."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = x.to(exact)
    # Block by block and added up in float64, because long sums of equal terms lose digits.
    out = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for begin in range(0, weight.shape[0], _ROWS):
        rows = rows_of(weight, begin, begin + _ROWS)
        for column in range(0, weight.columns, BLOCK):
            part = _block_of(rows, column).dequantize(exact)
            out[:, begin : begin + _ROWS] += given[:, column : column + BLOCK] @ part.T
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weight; multiplied in float32 and rounded once, or in float64."""
    out = weight.low.new_empty(weight.shape, dtype=dtype)
    rows = out.view(-1, weight.columns)
    all_rows = flat(weight)
    step = max(1, _ROWS * BLOCK // weight.columns)
    for begin in range(0, len(rows), step):
        rows[begin : begin + step] = rows_of(all_rows, begin, begin + step).dequantize(dtype)
    return out


def flat(weight: Packed) -> Packed:
    """The weights of all experts, one below the other."""
    if weight.low.dim() == 2:
        return weight
    scale = weight.scale.flatten(0, -2 if weight.scheme.group_size else -1)
    low, high = weight.low.flatten(0, -2), weight.high.flatten(0, -2)
    return Packed(low, high, scale, weight.scheme, weight.columns, weight.layout)


def rows_of(weight: Packed, begin: int, end: int) -> Packed:
    """Some rows, as views."""
    low, high, scale = (plane[begin:end] for plane in (weight.low, weight.high, weight.scale))
    return Packed(low, high, scale, weight.scheme, weight.columns, weight.layout)


def _block_of(weight: Packed, column: int) -> Packed:
    low, high = planes_shape(column)
    step_low, step_high = planes_shape(BLOCK)
    size = weight.scheme.group_size
    return Packed(
        weight.low[:, low : low + step_low],
        weight.high[:, high : high + step_high],
        weight.scale[:, column // size : (column + BLOCK) // size] if size else weight.scale,
        weight.scheme,
        min(BLOCK, weight.columns - column),
        weight.layout,
    )
