"""From float32 sums to the output: splits added in order, scale and bias, rounded once."""

# ruff: noqa: N803 (what is known when a kernel is compiled is in capitals)

from __future__ import annotations

from torch import Tensor

from core.triton import OPTIONS, constexpr, kernel, tensor, tl, triton
from core_fp6.kernels.gpu.decoding import rounded

_BLOCK = 1024


@kernel("tokens")
def finish_kernel(
    sums_ptr: tensor,
    scale_ptr: tensor,
    bias_ptr: tensor,
    out_ptr: tensor,
    tokens: tensor,
    rows: tensor,
    stride: tensor,
    SPLITS: constexpr,
    SCALED: constexpr,
    BIAS: constexpr,
    BLOCK: constexpr,
) -> None:
    """``out[token, row] = sum of sums[:, token, row] * scale[row] + bias[row]``."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = token * rows + row
    total = tl.load(sums_ptr + place, mask=inside, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        place += tokens.to(tl.int64) * rows
        total += tl.load(sums_ptr + place, mask=inside, other=0.0)
    if SCALED:
        total *= tl.load(scale_ptr + row, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * stride + row, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def finish(sums: Tensor, out: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Add up splits in their order, so that equal inputs give equal bits.

    Args:
        sums: float32 ``[splits, tokens, rows]``.
        out: ``[tokens, rows]``, written; rows side by side.
        scale: float32 ``[rows]`` or None.
        bias: ``[rows]`` or None.
    """
    splits, tokens, rows = sums.shape
    grid = tokens, triton.cdiv(rows, _BLOCK)
    finish_kernel[grid](
        sums,
        sums if scale is None else scale,
        sums if bias is None else bias,
        out,
        tokens,
        rows,
        out.stride(0),
        SPLITS=splits,
        SCALED=scale is not None,
        BIAS=bias is not None,
        BLOCK=_BLOCK,
        **OPTIONS,
    )
