"""What the kernels say in the language of Triton; importing it needs Triton."""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from core.triton import (
    OPTIONS as OPTIONS,
    constexpr as constexpr,
    jit as jit,
    kernel as kernel,
    made_current as made_current,
    tensor as tensor,
    tl as tl,
    triton as triton,
)

# The interpreter cuts bits off where a GPU rounds to bfloat16, and cannot multiply it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


@jit
def rounded(values: tensor, dtype: constexpr) -> tensor:
    """float32 values rounded to the nearest of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return values.to(dtype)


@jit
def product(left: tensor, right: tensor, precision: constexpr) -> tensor:
    """Product of matrices, added up in float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=precision)


@jit
def offset_of(index: tensor, stride: tensor) -> tensor:
    """``index * stride`` in 64 bits."""
    return index.to(tl.int64) * stride


@jit
def rows_of(
    pointer: tensor, row: tensor, stride: tensor, count: tensor, DIM: constexpr, WIDTH: constexpr
) -> tensor:
    """Some rows ``[rows, WIDTH]`` of a matrix, zeros beyond its ends."""
    dim = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (dim < DIM)
    return tl.load(pointer + offset_of(row, stride)[:, None] + dim, mask=inside, other=0.0)


@jit
def tanh(x: tensor) -> tensor:
    """Hyperbolic tangent, to a few roundings of float32 everywhere."""
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    size = (1 - small) / (1 + small)
    # Near zero the difference has lost its digits.
    square = x * x
    series = tl.abs(x) * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    size = tl.where(tl.abs(x) < 0.1, series, size)
    return tl.where(x < 0, -size, size)


@jit
def scored(products: tensor, scale: tensor, softcap: tensor, SOFTCAP: constexpr) -> tensor:
    """Products to logits in base two."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2E)
    return products * (scale * LOG2E)


@jit
def sloped(steps: tensor, logits: tensor, softcap: tensor, SOFTCAP: constexpr) -> tensor:
    """Gradients of logits to those of scaled products."""
    if SOFTCAP:
        capped = logits / (softcap * LOG2E)
        return steps * (1 - capped * capped)
    return steps


@jit
def seen(
    row: tensor,
    column: tensor,
    rows: tensor,
    columns: tensor,
    mask_ptr: tensor,
    mask_row: tensor,
    mask_column: tensor,
    CAUSAL: constexpr,
    MASKED: constexpr,
) -> tensor:
    """Which queries see which keys; ``row`` and ``column`` are broadcast."""
    inside = (row < rows) & (column < columns)
    if CAUSAL:
        inside &= column <= row
    if MASKED:
        at = mask_ptr + offset_of(row, mask_row) + offset_of(column, mask_column)
        inside &= tl.load(at, mask=inside, other=0) != 0
    return inside
