"""What the kernels of dense and of grouped products share: a tile of them.

Weights are the left operand, because a batch of tokens may be small and matrix units want many rows
there (FP6-LLM, arXiv 2401.14112, section 4). Codes are exact in the operand's dtype; scales multiply
float32 sums.
"""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from core.triton import at_compile_time, constexpr, jit, tensor, tl
from core_fp6.kernels.gpu.decoding import INTERPRETED, exponent, fragment_order, in_fragments


@at_compile_time
def _span(group_size: int) -> int:
    """Columns of one matrix product: scales cannot change within."""
    return min(group_size, 128) if group_size else 128


@jit
def _pair(first: tensor, second: tensor, ROWS: constexpr) -> tensor:
    """Two parts side by side."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (ROWS, 128))


@jit
def _half(part: tensor, SECOND: constexpr, ROWS: constexpr) -> tensor:
    """The first or second 32 columns of a part."""
    first, second = tl.split(tl.permute(tl.reshape(part, (ROWS, 2, 32)), (0, 2, 1)))
    return second if SECOND else first


@jit
def _loaded(
    x: tensor,
    column: tensor,
    columns: tensor,
    SPAN: constexpr,
    EVEN: constexpr,
) -> tensor:
    """``[SPAN, tokens]`` from ``column`` on; zero beyond the last column."""
    if EVEN:
        loaded = tl.load(x + column)
    else:
        inside = column + tl.arange(0, SPAN) < columns
        loaded = tl.load(x + column, mask=inside[:, None], other=0.0)
    return loaded


@jit
def _matrix_product(weights: tensor, x: tensor, total: tensor) -> tensor:
    if INTERPRETED and x.dtype == tl.bfloat16:
        total = tl.dot(weights.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
    elif x.dtype == tl.float8e4nv:
        # FP8 units add up few bits, so sums move on to float32 after every product.
        total = tl.dot(weights, x, total, max_num_imprecise_acc=weights.shape[1])
    else:
        total = tl.dot(weights, x, total)
    return total


@jit
def _dot(weights: tensor, x: tensor, total: tensor) -> tensor:
    """``weights @ x + total``; float32 ``x`` is the exact sum of three bfloat16."""
    if x.dtype == tl.float32:
        first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        # Nothing is left of an infinity; the difference would be NaN.
        rest = tl.where(x == first, 0.0, x - first)
        second = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        total = _matrix_product(weights, (rest - second).to(tl.bfloat16), total)
        total = _matrix_product(weights, second.to(tl.bfloat16), total)
        total = _matrix_product(weights, first.to(tl.bfloat16), total)
    else:
        total = _matrix_product(weights, x, total)
    return total


@jit
def _scales_of_block(
    scales: tensor,
    block: tensor,
    groups: tensor,
    GROUP: constexpr,
    EVEN: constexpr,
) -> tensor:
    """``[ROWS, groups of a block]``; the last block may go on where there are no more groups.

    Without groups nothing is loaded.
    """
    COUNT: constexpr = 256 // GROUP if GROUP else 0
    if COUNT == 0:
        loaded = scales
    elif EVEN:
        loaded = tl.load(scales + block * COUNT)
    else:
        inside = block * COUNT + tl.arange(0, COUNT) < groups
        loaded = tl.load(scales + block * COUNT, mask=inside[None, :], other=0.0)
    return loaded


@jit
def _scale_of(
    scales: tensor,
    INDEX: constexpr,
    COUNT: constexpr,
    ROWS: constexpr,
) -> tensor:
    """Column ``INDEX`` of ``scales``, a float32 ``[ROWS]``."""
    chosen = scales
    for bit in tl.static_range(COUNT.bit_length() - 1):
        first, second = tl.split(tl.reshape(chosen, (ROWS, COUNT >> (bit + 1), 2)))
        chosen = second if INDEX >> bit & 1 else first
    return tl.reshape(chosen, (ROWS,)).to(tl.float32)


@jit
def tile(
    x_ptr: tensor,
    low_ptr: tensor,
    high_ptr: tensor,
    scale_ptr: tensor,
    rows: tensor,
    tokens: tensor,
    columns: tensor,
    first: tensor,
    last: tensor,
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
    WARPS: constexpr,
) -> tensor:
    """``[ROWS, TOKENS]`` of ``weight @ x.T`` over some blocks of columns.

    Args:
        x_ptr: ``[tokens, columns]``.
        low_ptr: int32 words of the low plane.
        high_ptr: int32 words of the high plane.
        scale_ptr: float32 ``[rows]``, or bfloat16 ``[rows, groups]``.
        rows: int64 ``[ROWS]``, which rows of the weight, all of them there.
        tokens: int64 ``[TOKENS]``, which rows of ``x``, all of them there.
        columns: of ``x``.
        first: block to begin with.
        last: block to end before.
        blocks: of 256 columns in a row.
        groups: scales in a row.
        merge: bits of the high plane in a word.
        UPPER: bits of the high plane.
        MANTISSA: bits of the mantissa.
        GROUP: columns that share a scale, 0 for one scale per row.
        DTYPE: of the operands of the matrix units.
        EVEN: whether ``x`` has all columns of the last block.
        ROWS: of the tile.
        TOKENS: of the tile.
        WARPS: of the program.

    Returns:
        float32 sums with rows in the order of ``fragment_order``. Scales of groups are applied;
        those of rows are not, and neither is ``2 ** exponent`` without groups.
    """
    SPAN: constexpr = _span(GROUP)
    COUNT: constexpr = 256 // GROUP if GROUP else 1
    FACTOR: constexpr = 2.0 ** exponent(DTYPE, MANTISSA)
    word = tl.arange(0, 16)[None, :]
    low = low_ptr + rows[:, None] * (blocks * 32) + word
    high = high_ptr + rows[:, None] * (blocks * 16) + word
    x = x_ptr + tokens[None, :] * columns + tl.arange(0, SPAN)[:, None]
    # Where all blocks are full, their scales are known to be aligned.
    scale_stride = blocks * COUNT if EVEN else groups
    scales = scale_ptr + rows[:, None] * scale_stride + tl.arange(0, COUNT)[None, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in range(first, last):
        upper = tl.load(high + block * 16)
        even = tl.load(low + block * 32)
        odd = tl.load(low + block * 32 + 16)
        block_scales = _scales_of_block(scales, block, groups, GROUP, EVEN)
        for pair in tl.static_range(2):
            a = in_fragments(upper, even, merge, 2 * pair, UPPER, MANTISSA, DTYPE, ROWS, WARPS)
            b = in_fragments(upper, odd, merge, 2 * pair + 1, UPPER, MANTISSA, DTYPE, ROWS, WARPS)
            for span in tl.static_range(128 // SPAN):
                if SPAN == 128:
                    weights = _pair(a, b, ROWS)
                elif SPAN == 64:
                    weights = b if span else a
                else:
                    weights = _half(b if span >= 2 else a, span % 2, ROWS)
                column = block * 256 + 128 * pair + span * SPAN
                operand = _loaded(x, column, columns, SPAN, EVEN)
                if GROUP:
                    product = _dot(weights, operand, tl.zeros_like(total))
                    group = (128 * pair + span * SPAN) // GROUP
                    scale = _scale_of(block_scales, group, COUNT, ROWS) * FACTOR
                    total += product * fragment_order(scale, ROWS, WARPS)[:, None]
                else:
                    total = _dot(weights, operand, total)
    return total
