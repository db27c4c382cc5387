"""The products in plain torch: what every kernel is held against, and the last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from core_fp6.weights.packed import Packed


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, added up in float32 (float64 for such input) and rounded once.

    Args:
        x: ``[tokens, columns]``.
        weight: ``[rows, columns]``.
        bias: ``[rows]``.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = x.to(exact) @ weight.dequantize(exact).T
    if bias is not None:
        product = product + bias.to(exact)
    return product.to(x.dtype)


def grouped_linear(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """``x[begin:end] @ weight[expert].T`` for every expert.

    Args:
        x: ``[tokens, columns]``, the tokens of an expert side by side, in the order of experts.
        weight: ``[experts, rows, columns]``.
        ends: int32 ``[experts]``: where the tokens of each expert end.
    """
    out = x.new_zeros(x.shape[0], weight.shape[-2])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            out[begin:end] = linear(x[begin:end], expert_of(weight, expert))
        begin = end
    return out


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weight ``[..., rows, columns]``: multiplied in float32 and rounded once, or in float64."""
    return weight.dequantize(dtype)


def expert_of(weight: Packed, expert: int) -> Packed:
    """The weight of one expert, as views."""
    return Packed(
        weight.low[expert],
        weight.high[expert],
        weight.scale[expert],
        weight.scheme,
        weight.columns,
        weight.layout,
    )
