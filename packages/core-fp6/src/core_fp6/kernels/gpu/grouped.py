"""Products with the weights of many experts in one launch."""

# ruff: noqa: N803, SIM300 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from torch import Tensor

from core.triton import OPTIONS, constexpr, kernel, tensor, tl, triton
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


@kernel("merge")
def grouped_kernel(
    x_ptr: tensor,
    low_ptr: tensor,
    high_ptr: tensor,
    scale_ptr: tensor,
    token_scale_ptr: tensor,
    ends_ptr: tensor,
    out_ptr: tensor,
    experts: tensor,
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
    ROWS: constexpr,
    TOKENS: constexpr,
    EXPERTS: constexpr,
    WARPS: constexpr,
) -> None:
    """A tile of the tokens of one expert, which every program finds by itself.

    There are as many programs as there can be tiles; those that have none are done at once.
    ``EXPERTS`` is a power of two that is not below ``experts``.
    """
    place = tl.program_id(0)
    index = tl.arange(0, EXPERTS)
    there = index < experts
    end = tl.load(ends_ptr + index, mask=there, other=0)
    begin = tl.load(ends_ptr + index - 1, mask=there & (index > 0), other=0)
    tiles = tl.where(there & (end > begin), (end - begin + TOKENS - 1) // TOKENS, 0)
    tiles_so_far = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_so_far <= place).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    mine = index == expert
    first_tile = tl.sum(tl.where(mine, tiles_so_far - tiles, 0), 0)
    first_token = tl.sum(tl.where(mine, begin, 0), 0) + (place - first_tile) * TOKENS
    last_token = tl.sum(tl.where(mine, end, 0), 0)

    token = first_token + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Rows of all experts follow each other in the planes and the scales.
    row_of_all = expert.to(tl.int64) * rows + tl.minimum(row, rows - 1)
    total = tile(
        x_ptr,
        low_ptr,
        high_ptr,
        scale_ptr,
        row_of_all,
        tl.minimum(token, last_token - 1).to(tl.int64),
        columns,
        0,
        blocks,
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
    inside = (row < rows)[:, None] & (token < last_token)[None, :]
    if GROUP == 0:
        total *= (tl.load(scale_ptr + row_of_all) * 2.0 ** exponent(DTYPE, MANTISSA))[:, None]
    if DTYPE == tl.float8e4nv:
        total *= tl.load(token_scale_ptr + token, mask=token < last_token, other=0.0)[None, :]
    out = out_ptr + token[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(out, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def grouped_linear(
    x: Tensor, weight: Packed, ends: Tensor, config: Config, fp8: bool = False
) -> Tensor:
    """``x[begin:end] @ weight[expert].T`` for every expert, without asking the device for ``ends``.

    Args:
        x: ``[tokens, columns]``, float16, bfloat16 or float32, without gaps.
        weight: ``[experts, rows, columns]`` in the layout of kernels.
        ends: int32 ``[experts]``, not falling: where the tokens of each expert end.
        config: sizes of tiles; its splits are not used.
        fp8: round activations to FP8 first.

    Returns:
        ``[tokens, rows]``; zeros for tokens of no expert.
    """
    tokens, (experts, rows) = x.shape[0], weight.shape[:2]
    out = x.new_zeros(tokens, rows)
    operand, token_scale = in_fp8(x) if fp8 else (x, x)
    low, high, scale = planes(weight)
    # A tile that is not full is the last one of its expert.
    most_tiles = tokens // config.tokens + min(experts, tokens)
    grid = most_tiles, triton.cdiv(rows, config.rows)
    grouped_kernel[grid](
        operand,
        low,
        high,
        scale,
        token_scale,
        ends.contiguous(),
        out,
        experts,
        rows,
        operand.shape[1],
        blocks_of(weight),
        groups_of(weight),
        merge_of(weight),
        **constants(weight),
        DTYPE=OPERANDS[operand.dtype],
        EVEN=is_even(weight),
        ROWS=config.rows,
        TOKENS=config.tokens,
        EXPERTS=triton.next_power_of_2(experts),
        WARPS=config.warps,
        num_warps=config.warps,
        num_stages=config.stages,
        **OPTIONS,
    )
    return out
