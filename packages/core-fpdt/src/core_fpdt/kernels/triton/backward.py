"""Gradients of a block from the log-sum-exp of whole rows and ``delta = sum(grad * output)``.

One kernel has some keys of a key head and walks along all queries that read them, so that nothing
is added up in memory; the other has some queries and walks along the keys. Both make the weights
anew. All sums are in float32, and so are the gradients.
"""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

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
    sloped,
    tensor,
    tl,
)


@jit
def _ends(lse_ptr: tensor, delta_ptr: tensor, row: tensor, rows: tensor) -> tuple[tensor, tensor]:
    """Log-sum-exp of rows in base two, infinite where no key is seen at all, and their delta."""
    lse = tl.load(lse_ptr + row, mask=row < rows, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse * LOG2E, tl.load(delta_ptr + row, mask=row < rows, other=0.0)


@kernel("rows", "columns")
def key_kernel(
    grad_ptr: tensor,
    query_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    mask_ptr: tensor,
    lse_ptr: tensor,
    delta_ptr: tensor,
    key_grad_ptr: tensor,
    value_grad_ptr: tensor,
    scale: tensor,
    softcap: tensor,
    rows: tensor,
    columns: tensor,
    grad_batch: tensor,
    grad_head: tensor,
    grad_row: tensor,
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
    ROWS: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    """Gradients of some keys of one key head and of their values."""
    key_heads: constexpr = HEADS // GROUP
    batch, shared = tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    key_ptr += offset_of(batch, key_batch) + offset_of(shared, key_head)
    value_ptr += offset_of(batch, value_batch) + offset_of(shared, value_head)
    key = rows_of(key_ptr, column, key_row, columns, DIM, WIDTH)
    value = rows_of(value_ptr, column, value_row, columns, VALUE_DIM, VALUE_WIDTH)

    key_grad = tl.zeros((COLUMNS, WIDTH), tl.float32)
    value_grad = tl.zeros((COLUMNS, VALUE_WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * COLUMNS // ROWS * ROWS
    for member in range(GROUP):
        head = shared * GROUP + member
        query_at = query_ptr + offset_of(batch, query_batch) + offset_of(head, query_head)
        grad_at = grad_ptr + offset_of(batch, grad_batch) + offset_of(head, grad_head)
        mask_at = mask_ptr + offset_of(batch, mask_batch) + offset_of(head, mask_head)
        ends_at = offset_of(batch * HEADS + head, rows)
        for start in range(begin, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            query = rows_of(query_at, row, query_row, rows, DIM, WIDTH)
            grad = rows_of(grad_at, row, grad_row, rows, VALUE_DIM, VALUE_WIDTH)
            lse, delta = _ends(lse_ptr + ends_at, delta_ptr + ends_at, row, rows)
            products = product(key, tl.trans(query), PRECISION)
            logits = scored(products, scale, softcap, SOFTCAP)
            visible = seen(
                row[None, :],
                column[:, None],
                rows,
                columns,
                mask_at,
                mask_row,
                mask_column,
                CAUSAL,
                MASKED,
            )
            weights = tl.exp2(tl.where(visible, logits - lse[None, :], float("-inf")))
            dtype: constexpr = query_ptr.dtype.element_ty
            value_grad += product(rounded(weights, dtype), grad, PRECISION)
            inner = product(value, tl.trans(grad), PRECISION)
            steps = sloped(weights * (inner - delta[None, :]), logits, softcap, SOFTCAP)
            key_grad += product(rounded(steps, dtype), query, PRECISION)

    at = offset_of(offset_of(tl.program_id(1), columns) + column, 1)
    dim, value_dim = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = (column < columns)[:, None]
    tl.store(
        key_grad_ptr + offset_of(at, DIM)[:, None] + dim,
        key_grad * scale,
        mask=inside & (dim < DIM),
    )
    tl.store(
        value_grad_ptr + offset_of(at, VALUE_DIM)[:, None] + value_dim,
        value_grad,
        mask=inside & (value_dim < VALUE_DIM),
    )


@kernel("rows", "columns")
def query_kernel(
    grad_ptr: tensor,
    query_ptr: tensor,
    key_ptr: tensor,
    value_ptr: tensor,
    mask_ptr: tensor,
    lse_ptr: tensor,
    delta_ptr: tensor,
    query_grad_ptr: tensor,
    scale: tensor,
    softcap: tensor,
    rows: tensor,
    columns: tensor,
    grad_batch: tensor,
    grad_head: tensor,
    grad_row: tensor,
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
    ROWS: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    """Gradients of some queries of one head."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query_ptr += offset_of(batch, query_batch) + offset_of(head, query_head)
    grad_ptr += offset_of(batch, grad_batch) + offset_of(head, grad_head)
    key_ptr += offset_of(batch, key_batch) + offset_of(head // GROUP, key_head)
    value_ptr += offset_of(batch, value_batch) + offset_of(head // GROUP, value_head)
    mask_ptr += offset_of(batch, mask_batch) + offset_of(head, mask_head)
    ends_at = offset_of(tl.program_id(1), rows)
    query = rows_of(query_ptr, row, query_row, rows, DIM, WIDTH)
    grad = rows_of(grad_ptr, row, grad_row, rows, VALUE_DIM, VALUE_WIDTH)
    lse, delta = _ends(lse_ptr + ends_at, delta_ptr + ends_at, row, rows)

    query_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    end = columns
    if CAUSAL:
        end = tl.minimum(columns, (tl.program_id(0) + 1) * ROWS)
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key = rows_of(key_ptr, column, key_row, columns, DIM, WIDTH)
        value = rows_of(value_ptr, column, value_row, columns, VALUE_DIM, VALUE_WIDTH)
        products = product(query, tl.trans(key), PRECISION)
        logits = scored(products, scale, softcap, SOFTCAP)
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
        weights = tl.exp2(tl.where(visible, logits - lse[:, None], float("-inf")))
        inner = product(grad, tl.trans(value), PRECISION)
        steps = sloped(weights * (inner - delta[:, None]), logits, softcap, SOFTCAP)
        query_grad += product(rounded(steps, query_ptr.dtype.element_ty), key, PRECISION)

    dim = tl.arange(0, WIDTH)
    at = offset_of(ends_at + row, DIM)[:, None] + dim
    inside = (row < rows)[:, None] & (dim < DIM)
    tl.store(query_grad_ptr + at, query_grad * scale, mask=inside)
