"""Activations in FP8: every token divided by its own scale and rounded."""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

import torch
from torch import Tensor

from core.triton import (
    OPTIONS,
    at_compile_time,
    constexpr,
    jit,
    kernel,
    tensor,
    tl,
)
from core_fp6.kernels.gpu.decoding import rounded
from core_fp6.layouts import execution

LARGEST = tl.constexpr(448.0)
"""The largest FP8 E4M3 value."""


@at_compile_time
def _smallest() -> float:
    return 2.0**-100


@jit
def place_of(column: tensor) -> tensor:
    """Where the fused kernel wants a column of FP8 activations.

    With the bits of ``column = 16b + 8e + 2q + h`` in a part, ``place = 16b + 4q + 2h + e``: four
    neighbouring places are the four columns of a word.
    """
    inside = column & 15
    return (column - inside) + ((inside >> 1) & 3) * 4 + (inside & 1) * 2 + (inside >> 3)


@kernel()
def quantize_kernel(
    x_ptr: tensor,
    out_ptr: tensor,
    scale_ptr: tensor,
    columns: tensor,
    stride: tensor,
    BLOCK: constexpr,
) -> None:
    """One token: its scale, and its columns in FP8, zeros beyond the last."""
    token = tl.program_id(0).to(tl.int64)
    x = x_ptr + token * columns
    largest = tl.zeros((BLOCK,), tl.float32)
    no_numbers = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        no_numbers |= (value != value).to(tl.int32)
    # Far below what activations are, and its inverse is a number.
    scale = tl.maximum(tl.max(largest, 0) / LARGEST, _smallest())
    # NaN gets lost on the way to FP8; the scale brings it to all outputs of the token.
    lost = tl.max(no_numbers, 0) > 0
    tl.store(scale_ptr + token, tl.where(lost, float("nan"), scale))
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        # A quotient may round to more than the largest value, which would become NaN.
        value = tl.minimum(tl.maximum(tl.div_rn(value, scale), -LARGEST), LARGEST)
        place = out_ptr + token * stride + place_of(column)
        tl.store(place, rounded(value, tl.float8e4nv), mask=column < stride)


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to FP8 E4M3 with one scale per token.

    Args:
        x: ``[tokens, columns]``, without gaps.

    Returns:
        float8_e4m3fn ``[tokens, columns filled up to blocks]`` in the order of :func:`place_of`,
        and float32 ``[tokens]``.
    """
    tokens, columns = x.shape
    stride = -(-columns // execution.BLOCK) * execution.BLOCK
    out = x.new_empty(tokens, stride, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(tokens, dtype=torch.float32)
    quantize_kernel[(tokens,)](x, out, scale, columns, stride, BLOCK=1024, **OPTIONS)
    return out, scale
