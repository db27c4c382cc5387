"""Attention of a block, with the merge into what was attended before as its epilogue.

One program has some queries of one head and walks along the keys with an online softmax in base
two. Before it writes, it reads what those queries have from other blocks, so that the merge costs no
pass of its own over outputs in float32.
"""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)
# Which branches there are is known then, too.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from core_fpdt.kernels.triton.language import (
    LOG2E,
    constexpr,
    jit,
    kernel,
    offset_of,
    product,
    rounded,
    rows_of,
    scored,
    seen,
    tensor,
    tl,
)


@jit
def _merged(
    output: tensor,
    lse: tensor,
    at: tensor,
    inside: tensor,
    at_output: tensor,
    inside_output: tensor,
    old_ptr: tensor,
    old_lse_ptr: tensor,
) -> tuple[tensor, tensor]:
    """A part in base e with the part that is in memory."""
    old_lse = tl.load(old_lse_ptr + at, mask=inside, other=float("-inf"))
    old = tl.load(old_ptr + at_output, mask=inside_output, other=0.0).to(tl.float32)
    # Kernels leave anything in rows that see no key.
    old = tl.where((old_lse == float("-inf"))[:, None], 0.0, old)
    top = tl.maximum(old_lse, lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    old_share, share = tl.exp2((old_lse - base) * LOG2E), tl.exp2((lse - base) * LOG2E)
    total = old_share + share
    whole = tl.where(total == 0, 1.0, total)
    merged = (old * old_share[:, None] + output * share[:, None]) / whole[:, None]
    return merged, tl.where(total == 0, float("-inf"), base + tl.log(whole))


@kernel("rows", "columns")
def forward_kernel(
    query_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    mask_ptr: tensor,
    old_ptr: tensor,
    old_lse_ptr: tensor,
    out_ptr: tensor,
    lse_ptr: tensor,
    scale: tensor,
    softcap: tensor,
    rows: tensor,
    columns: tensor,
    query_batch: tensor,
    query_head: tensor,
    query_row: tensor,
    key_batch: tensor,
    key_head: tensor,
    key_row: tensor,
    value_batch: tensor,
    value_head: tensor,
    value_row: tensor,
    mask_batch: tensor,
    mask_head: tensor,
    mask_row: tensor,
    mask_column: tensor,
    HEADS: constexpr,
    GROUP: constexpr,
    DIM: constexpr,
    VALUE_DIM: constexpr,
    WIDTH: constexpr,
    VALUE_WIDTH: constexpr,
    CAUSAL: constexpr,
    MASKED: constexpr,
    SOFTCAP: constexpr,
    MERGED: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    """Some queries of one head."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query_ptr += offset_of(batch, query_batch) + offset_of(head, query_head)
    key_ptr += offset_of(batch, key_batch) + offset_of(head // GROUP, key_head)
    value_ptr += offset_of(batch, value_batch) + offset_of(head // GROUP, value_head)
    mask_ptr += offset_of(batch, mask_batch) + offset_of(head, mask_head)
    query = rows_of(query_ptr, row, query_row, rows, DIM, WIDTH)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    end = columns
    if CAUSAL:
        end = tl.minimum(columns, (tl.program_id(0) + 1) * ROWS)
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key = rows_of(key_ptr, column, key_row, columns, DIM, WIDTH)
        logits = scored(product(query, tl.trans(key), PRECISION), scale, softcap, SOFTCAP)
        visible = seen(
            row[:, None],
            column[None, :],
            rows,
            columns,
            mask_ptr,
            mask_row,
            mask_column,
            CAUSAL,
            MASKED,
        )
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # Minus infinity less itself is no number.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        value = rows_of(value_ptr, column, value_row, columns, VALUE_DIM, VALUE_WIDTH)
        weights = rounded(weights, value_ptr.dtype.element_ty)
        sums = sums * keep[:, None] + product(weights, value, PRECISION)
        top = highest

    whole = tl.where(total == 0, 1.0, total)
    output = sums / whole[:, None]
    lse = tl.where(total == 0, float("-inf"), (top + tl.log2(whole)) / LOG2E)
    at = offset_of(tl.program_id(1), rows) + row
    dim = tl.arange(0, VALUE_WIDTH)
    at_output = offset_of(at, VALUE_DIM)[:, None] + dim
    inside = row < rows
    inside_output = inside[:, None] & (dim < VALUE_DIM)
    if MERGED:
        output, lse = _merged(
            output, lse, at, inside, at_output, inside_output, old_ptr, old_lse_ptr
        )
    tl.store(out_ptr + at_output, output, mask=inside_output)
    tl.store(lse_ptr + at, lse, mask=inside)
