"""Weights of codes, in memory."""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from core.triton import OPTIONS, constexpr, kernel, tensor, tl, triton
from core_fp6.kernels.gpu.arguments import blocks_of, constants, groups_of, merge_of, planes
from core_fp6.kernels.gpu.decoding import fragment_order, in_fragments, rounded
from core_fp6.weights.packed import Packed

_ROWS = 64
_WARPS = 4


@kernel("merge")
def dequantize_kernel(
    low_ptr: tensor,
    high_ptr: tensor,
    scale_ptr: tensor,
    out_ptr: tensor,
    rows: tensor,
    columns: tensor,
    blocks: tensor,
    groups: tensor,
    merge: tensor,
    UPPER: constexpr,
    MANTISSA: constexpr,
    GROUP: constexpr,
    SCALED: constexpr,
    ROWS: constexpr,
    WARPS: constexpr,
) -> None:
    """A block of columns of ``ROWS`` rows: values of codes, or values times scales."""
    block = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(row, rows - 1)
    word = tl.arange(0, 16)[None, :]
    high = tl.load(high_ptr + near[:, None] * (blocks * 16) + block * 16 + word)
    low = low_ptr + near[:, None] * (blocks * 32) + block * 32 + word
    near, row = (
        fragment_order(near, ROWS, WARPS)[:, None],
        fragment_order(row, ROWS, WARPS)[:, None],
    )
    for part in tl.static_range(4):
        half = tl.load(low + part % 2 * 16)
        codes = in_fragments(high, half, merge, part, UPPER, MANTISSA, tl.bfloat16, ROWS, WARPS)
        values = codes.to(tl.float32)
        first = block * 256 + part * 64
        column = first + tl.arange(0, 64)[None, :]
        if SCALED:
            if GROUP == 0:
                scale = tl.load(scale_ptr + near)
            elif GROUP == 32:
                group = tl.minimum(column // GROUP, groups - 1)
                scale = tl.load(scale_ptr + near * groups + group).to(tl.float32)
            else:
                group = tl.minimum(first // GROUP, groups - 1)
                scale = tl.load(scale_ptr + near * groups + group).to(tl.float32)
            values *= scale
        tl.store(
            out_ptr + row * columns + column,
            rounded(values, out_ptr.dtype.element_ty),
            mask=(row < rows) & (column < columns),
        )


def dequantize(weight: Packed, dtype: torch.dtype, scaled: bool = True) -> Tensor:
    """Weights of codes: multiplied in float32 and rounded once.

    Args:
        weight: ``[..., rows, columns]`` in the layout of kernels.
        dtype: float16, bfloat16 or float32.
        scaled: false for the values of the codes alone, which are exact.

    Returns:
        ``[..., rows, columns]``.
    """
    out = weight.low.new_empty(weight.shape, dtype=dtype)
    low, high, scale = planes(weight)
    rows = out.numel() // weight.columns
    grid = triton.cdiv(rows, _ROWS), blocks_of(weight)
    dequantize_kernel[grid](
        low,
        high,
        scale,
        out,
        rows,
        weight.columns,
        blocks_of(weight),
        groups_of(weight),
        merge_of(weight),
        **constants(weight),
        SCALED=scaled,
        ROWS=_ROWS,
        WARPS=_WARPS,
        num_warps=_WARPS,
        **OPTIONS,
    )
    return out
