"""Six-bit codes to values, four at a time in the bytes of 32-bit words.

A word of the high plane is shifted so that the sign and the top of the exponent stand where an FP8
E4M3 byte has them, and merged with the four lower bits of a word of the low plane. As FP8 the bytes
are the values times a power of two, subnormals included, because the exponent only has another bias
(FP6-LLM, arXiv 2401.14112, section 5). Halves of words become bfloat16 or float16 in the same way.

:func:`exponent` is that power of two; for bfloat16 it would be far too small to be left to the
accumulator, so :func:`in_fragments` multiplies by it, which is exact.
"""

# ruff: noqa: N803, SIM300 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from typing import Any

from core.triton import at_compile_time, constexpr, jit, tensor, tl, triton

# The interpreter cannot compute with bfloat16: there its values go through float32, which is exact.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@jit
def rounded(values: tensor, dtype: constexpr) -> tensor:
    """float32 values rounded to the nearest of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        values = _without_low_bits(values, 16)
    elif INTERPRETED and dtype == tl.float8e4nv:
        # Subnormal values are multiples of 2**-9, as float32 near 2**14 are.
        small = (values + 1.5 * 2.0**14) - 1.5 * 2.0**14
        values = tl.where(tl.abs(values) < 2.0**-6, small, _without_low_bits(values, 20))
    return values.to(dtype)


@jit
def _without_low_bits(values: tensor, COUNT: constexpr) -> tensor:
    """Rounded to even, where the interpreter would cut off."""
    bits = values.to(tl.uint32, bitcast=True)
    bits += (1 << (COUNT - 1)) - 1 + ((bits >> COUNT) & 1)
    return ((bits >> COUNT) << COUNT).to(tl.float32, bitcast=True)


@at_compile_time
def exponent(dtype: Any, mantissa: int) -> int:
    """Power of two that brings what :func:`in_fragments` returns to the values of the codes.

    Args:
        dtype: tl.float16, tl.bfloat16 or tl.float8e4nv.
        mantissa: bits of the codes' mantissa, 2 or 3.
    """
    if dtype == tl.bfloat16:
        return 0
    bias = 15 if dtype == tl.float16 else 7
    power: int = bias - _code_bias(mantissa)
    return power


@at_compile_time
def _code_bias(mantissa: int) -> int:
    bias: int = 2 ** (4 - mantissa) - 1
    return bias


@at_compile_time
def _four_times(byte: int) -> int:
    """A byte in all bytes of a word, as a signed number."""
    word = byte * 0x01010101
    return word - 2**32 if word >= 2**31 else word


@at_compile_time
def _twice(half: int) -> int:
    """Sixteen bits in both halves of a word, as a signed number."""
    word = half * 0x00010001
    return word - 2**32 if word >= 2**31 else word


@at_compile_time
def _top(mantissa: int) -> int:
    """Bit of the top of the exponent in an FP8 byte."""
    return 7 - mantissa


@jit
def _shift(word: tensor, left: constexpr) -> tensor:
    return word << left if left >= 0 else word >> -left


@jit
def words(
    high: tensor,
    low: tensor,
    merge: tensor,
    PART: constexpr,
    UPPER: constexpr,
    MANTISSA: constexpr,
) -> tensor:
    """Words whose bytes are FP8 E4M3, except for bits that belong to none.

    Args:
        high: int32 words of the high plane.
        low: of the low plane: its first half for parts 0 and 2, its second for 1 and 3.
        merge: as :func:`core_fp6.kernels.gpu.arguments.merge_of` makes it.
        PART: 0 to 3.
        UPPER: as :data:`core_fp6.layouts.execution.UPPER` has it for the format.
        MANTISSA: bits of the mantissa, 2 or 3.
    """
    to_sign: constexpr = 7 - UPPER[PART][0]
    to_top: constexpr = _top(MANTISSA) - UPPER[PART][1]
    # A nibble ends at bit 0 for e2m3 and at bit 1 for e3m2.
    lower = _shift(low, 3 - MANTISSA - (4 if PART >= 2 else 0))
    if to_sign == to_top:
        upper = _shift(high, to_sign)
    else:
        # A product is two shifts in one; the bits alone do not meet others in it.
        bits = high & _four_times(1 << UPPER[PART][0] | 1 << UPPER[PART][1])
        upper = bits * (1 << to_sign | 1 << to_top)
    # One instruction, because no compiler knows the mask: of a constant it would make two masks and
    # two instructions. What is left in other bits goes with the masks that come later.
    return lower ^ ((upper ^ lower) & merge)


@jit
def _half(word: tensor, HIGH: constexpr, DTYPE: constexpr) -> tensor:
    half = word >> 16 if HIGH else word & 0xFFFF
    return half.to(tl.uint16).to(DTYPE, bitcast=True)


@jit
def _halves_of(word: tensor, DTYPE: constexpr, MANTISSA: constexpr) -> tensor:
    """Words ``[rows, n]`` as 16-bit floats ``[rows, n, e, h]``: the one of byte ``2h + e``."""
    down: constexpr = 4 if DTYPE == tl.bfloat16 else 1
    sign: constexpr = _twice(0x8000)
    size: constexpr = _twice(0x1F << (11 - MANTISSA - down))
    even = ((word << (8 - down)) & size) | ((word << 8) & sign)
    odd = ((word >> down) & size) | (word & sign)
    first = tl.join(_half(even, False, DTYPE), _half(odd, False, DTYPE))
    second = tl.join(_half(even, True, DTYPE), _half(odd, True, DTYPE))
    return tl.join(first, second)


@jit
def _byte(word: tensor, SHIFT: constexpr, DTYPE: constexpr) -> tensor:
    return ((word >> SHIFT) & 0xFF).to(tl.uint8).to(DTYPE, bitcast=True)


@jit
def _bytes(word: tensor, DTYPE: constexpr, MANTISSA: constexpr) -> tensor:
    """Words ``[rows, n]`` as FP8 ``[rows, n, h, e]``: byte ``2h + e``."""
    clean = word & _four_times(0x80 | 0x1F << (3 - MANTISSA))
    even = tl.join(_byte(clean, 0, DTYPE), _byte(clean, 16, DTYPE))
    odd = tl.join(_byte(clean, 8, DTYPE), _byte(clean, 24, DTYPE))
    return tl.join(even, odd)


@jit
def _scaled_up(values: tensor, MANTISSA: constexpr) -> tensor:
    power: constexpr = 127 - _code_bias(MANTISSA)
    if INTERPRETED:
        wide = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        values = (wide.to(tl.float32, bitcast=True) * 2.0**power).to(tl.bfloat16)
    else:
        bits: constexpr = (127 + power) << 7
        values *= tl.full((), bits, tl.uint16).to(tl.bfloat16, bitcast=True)
    return values


@jit
def in_fragments(
    high: tensor,
    low: tensor,
    merge: tensor,
    PART: constexpr,
    UPPER: constexpr,
    MANTISSA: constexpr,
    DTYPE: constexpr,
    ROWS: constexpr,
    WARPS: constexpr,
) -> tensor:
    """The 64 columns of a part, with rows in the order of :func:`fragment_order`.

    The order of rows makes the layout in which words are loaded the one in which matrix units read
    16-bit operands, so that the values stay in their registers.

    Args:
        high: int32 ``[ROWS, 16]``, words of the high plane.
        low: int32 ``[ROWS, 16]``, words of a half of the low plane.
        merge: int32, bits of the high plane in a word.
        PART: 0 to 3.
        UPPER: bits of the high plane.
        MANTISSA: bits of the mantissa.
        DTYPE: tl.float16, tl.bfloat16 or tl.float8e4nv.
        ROWS: a multiple of ``16 * WARPS``.
        WARPS: of the program.

    Returns:
        ``[ROWS, 64]`` of ``DTYPE``: values divided by ``2 ** exponent(DTYPE, MANTISSA)``. Columns
        are in order, for FP8 in the order that :func:`core_fp6.kernels.gpu.activations.place_of` says.
    """
    word = words(high, low, merge, PART, UPPER, MANTISSA)
    # Here the layout of kernels meets the bits that it gives to columns: words are [4q + b].
    if DTYPE == tl.float8e4nv:
        bytes_ = _bytes(word, DTYPE, MANTISSA)
        split = tl.reshape(bytes_, (ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2))
        values = tl.reshape(tl.permute(split, (0, 2, 1, 3, 5, 4, 6, 7)), (ROWS, 64))
    else:
        halves = _halves_of(word, DTYPE, MANTISSA)
        split = tl.reshape(halves, (ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2))
        values = tl.reshape(tl.permute(split, (0, 2, 1, 3, 5, 6, 4, 7)), (ROWS, 64))
        if DTYPE == tl.bfloat16:
            values = _scaled_up(values, MANTISSA)
    return values


@jit
def fragment_order(rows: tensor, ROWS: constexpr, WARPS: constexpr) -> tensor:
    """Values of rows ``[ROWS]`` in order, put into the order of :func:`in_fragments`."""
    split = tl.reshape(rows, (ROWS // (16 * WARPS), 2, WARPS, 8))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3)), (ROWS,))


@jit
def row_order(
    tile: tensor,
    ROWS: constexpr,
    COLUMNS: constexpr,
    WARPS: constexpr,
) -> tensor:
    """A tile ``[ROWS, COLUMNS]`` in the order of :func:`in_fragments` with its rows in order."""
    split = tl.reshape(tile, (ROWS // (16 * WARPS), WARPS, 2, 8, COLUMNS))
    return tl.reshape(tl.permute(split, (0, 2, 1, 3, 4)), (ROWS, COLUMNS))
