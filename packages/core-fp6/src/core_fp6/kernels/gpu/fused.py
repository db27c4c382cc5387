"""The product with a dense weight: decoded in registers, right before the matrix units."""

# ruff: noqa: N803, SIM300 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from core.triton import OPTIONS, constexpr, kernel, tensor, tl, triton
from core_fp6.kernels.gpu import finishing
from core_fp6.kernels.gpu.activations import in_fp8
from core_fp6.kernels.gpu.arguments import (
    OPERANDS,
    blocks_of,
    constants,
    groups_of,
    is_even,
    merge_of,
    planes,
)
from core_fp6.kernels.gpu.configs import Config
from core_fp6.kernels.gpu.decoding import exponent, rounded, row_order
from core_fp6.kernels.gpu.products import tile
from core_fp6.weights.packed import Packed


@kernel("tokens", "merge")
def linear_kernel(
    x_ptr: tensor,
    low_ptr: tensor,
    high_ptr: tensor,
    scale_ptr: tensor,
    token_scale_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    tokens: tensor,
    rows: tensor,
    columns: tensor,
    blocks: tensor,
    groups: tensor,
    merge: tensor,
    UPPER: constexpr,
    MANTISSA: constexpr,
    GROUP: constexpr,
    DTYPE: constexpr,
    EVEN: constexpr,
    BIAS: constexpr,
    ROWS: constexpr,
    TOKENS: constexpr,
    SPLITS: constexpr,
    WARPS: constexpr,
) -> None:
    """A tile of ``x @ weight.T``, or of one of the ``SPLITS`` sums over columns that make it up.

    The programs are ``[tiles of tokens, tiles of rows, SPLITS]``: those that share weights run side
    by side. With splits the output is float32 ``[SPLITS, tokens, rows]`` without bias.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    share = tl.cdiv(blocks, SPLITS)
    total = tile(
        x_ptr,
        low_ptr,
        high_ptr,
        scale_ptr,
        tl.minimum(row, rows - 1).to(tl.int64),
        tl.minimum(token, tokens - 1).to(tl.int64),
        columns,
        split * share,
        tl.minimum((split + 1) * share, blocks),
        blocks,
        groups,
        merge,
        UPPER,
        MANTISSA,
        GROUP,
        DTYPE,
        EVEN,
        ROWS,
        TOKENS,
        WARPS,
    )
    total = row_order(total, ROWS, TOKENS, WARPS)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    if GROUP == 0:
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        total *= (scale * 2.0 ** exponent(DTYPE, MANTISSA))[:, None]
    if DTYPE == tl.float8e4nv:
        total *= tl.load(token_scale_ptr + token, mask=token < tokens, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * tokens + token[None, :]) * rows + row[:, None]
    tl.store(out_ptr + place, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None, config: Config, fp8: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` in one kernel, and one more where columns are split.

    Args:
        x: ``[tokens, columns]``, float16, bfloat16 or float32, without gaps.
        weight: ``[rows, columns]`` in the layout of kernels.
        bias: ``[rows]`` or None.
        config: sizes of tiles.
        fp8: round activations to FP8 first.
    """
    tokens, rows = x.shape[0], weight.shape[0]
    out = x.new_empty(tokens, rows)
    operand, token_scale = in_fp8(x) if fp8 else (x, x)
    apart = config.splits > 1
    target = x.new_empty(config.splits, tokens, rows, dtype=torch.float32) if apart else out
    low, high, scale = planes(weight)
    grid = triton.cdiv(tokens, config.tokens), triton.cdiv(rows, config.rows), config.splits
    linear_kernel[grid](
        operand,
        low,
        high,
        scale,
        token_scale,
        x if bias is None else bias,
        target,
        tokens,
        rows,
        operand.shape[1],
        blocks_of(weight),
        groups_of(weight),
        merge_of(weight),
        **constants(weight),
        DTYPE=OPERANDS[operand.dtype],
        EVEN=is_even(weight),
        BIAS=bias is not None and not apart,
        ROWS=config.rows,
        TOKENS=config.tokens,
        SPLITS=config.splits,
        WARPS=config.warps,
        num_warps=config.warps,
        num_stages=config.stages,
        **OPTIONS,
    )
    if apart:
        finishing.finish(target, out, None, bias)
    return out
