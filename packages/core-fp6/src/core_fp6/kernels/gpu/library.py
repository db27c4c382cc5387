"""Products with many tokens: the weight is decoded to memory and multiplied by the vendor's library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from core_fp6.kernels.gpu.dequantizing import dequantize
from core_fp6.kernels.gpu.finishing import finish
from core_fp6.weights.packed import Packed

WORKSPACE = 256 * 2**20
"""Bytes of decoded weights at a time. The allocator gives out the same memory for every product."""


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``.

    With a scale per row the library multiplies codes, which are exact, and the scale is applied to
    float32 sums. With scales of groups weights are rounded to the dtype of ``x`` before the product.

    Args:
        x: ``[tokens, columns]``.
        weight: ``[rows, columns]`` in the layout of kernels.
        bias: ``[rows]`` or None.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, WORKSPACE // (weight.columns * x.dtype.itemsize))
    for rows, part in _slices(weight, step):
        part_bias = None if bias is None else bias[rows]
        if weight.scheme.group_size:
            matrix = dequantize(part, x.dtype).T
            if part_bias is None:
                torch.mm(x, matrix, out=out[:, rows])
            else:
                torch.addmm(part_bias.to(x.dtype), x, matrix, out=out[:, rows])
        else:
            sums = _sums(x, dequantize(part, x.dtype, scaled=False).T)
            finish(sums.unsqueeze(0), out[:, rows], part.scale, part_bias)
    return out


def _sums(x: Tensor, matrix: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x @ matrix
    return torch.mm(x, matrix, out_dtype=torch.float32)


def _slices(weight: Packed, step: int) -> Iterator[tuple[slice, Packed]]:
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, min(begin + step, weight.shape[0]))
        planes = weight.low[rows], weight.high[rows], weight.scale[rows]
        yield rows, replace(weight, low=planes[0], high=planes[1], scale=planes[2])
