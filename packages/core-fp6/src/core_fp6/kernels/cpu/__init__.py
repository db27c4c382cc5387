"""The products on processors: C kernels that are built at first use, or torch where none can be.

The best variant that works here is chosen once; ``CORE_FP6_CPU`` in the environment names another.
The meaning of the functions is that of :mod:`core_fp6.kernels.reference`: sums in float32, rounded
once. Numbers below 1e-38 in bfloat16 activations count as zero where the processor multiplies
bfloat16 itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.native import Variant
from core_fp6.kernels import reference
from core_fp6.kernels.cpu.choosing import KERNELS
from core_fp6.weights.packed import Packed

__all__ = ["Variant", "dequantize", "force", "grouped_linear", "linear", "variant"]


def variant() -> Variant:
    """Which variant computes here, and why it and none before it; builds it if need be."""
    return KERNELS.chosen().variant


def force(name: str | None) -> Variant:
    """Compute with one variant from now on; None chooses anew, as at the first call.

    Raises:
        SettingsError: when there is no such variant, or it does not work here.
    """
    return KERNELS.force(name).variant


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, added up in float32 (float64 for such input) and rounded once.

    The bits of the result do not depend on the number of threads, which is that of torch.

    Args:
        x: ``[tokens, columns]``, float16, bfloat16, float32 or float64; any strides.
        weight: ``[rows, columns]`` in the layout of kernels.
        bias: ``[rows]``.

    Returns:
        ``[tokens, rows]`` in the dtype of ``x``.
    """
    return KERNELS.chosen().linear(x, weight, bias)


def grouped_linear(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """``x[begin:end] @ weight[expert].T`` for every expert.

    Args:
        x: ``[tokens, columns]``, the tokens of an expert side by side, in the order of experts.
        weight: ``[experts, rows, columns]`` in the layout of kernels.
        ends: int32 ``[experts]``: where the tokens of each expert end.

    Returns:
        ``[tokens, rows]``.
    """
    kernel = KERNELS.chosen()
    out = x.new_zeros(x.shape[0], weight.shape[-2])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            out[begin:end] = kernel.linear(x[begin:end], reference.expert_of(weight, expert), None)
        begin = end
    return out


def dequantize(weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[..., rows, columns]``; multiplied in float32 and rounded once, or in float64.

    Args:
        weight: in the layout of kernels.
        dtype: of the result.
    """
    return KERNELS.chosen().dequantize(weight, dtype)
