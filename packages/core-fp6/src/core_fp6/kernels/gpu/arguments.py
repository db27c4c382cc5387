"""What all kernels are told about a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.triton import tl
from core_fp6.layouts import execution
from core_fp6.weights.packed import Packed

OPERANDS: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
"""For activations of a dtype, the dtype in which codes meet them: one that holds codes exactly."""


def planes(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Low and high plane as int32 words, and the scales; all without gaps."""
    low, high = weight.low.contiguous(), weight.high.contiguous()
    return low.view(torch.int32), high.view(torch.int32), weight.scale.contiguous()


def blocks_of(weight: Packed) -> int:
    """Blocks of 256 columns in a row."""
    return -(-weight.columns // execution.BLOCK)


def groups_of(weight: Packed) -> int:
    """Scales of a row."""
    return weight.scheme.groups(weight.columns)


def merge_of(weight: Packed) -> int:
    """Where the sign and the top of the exponent stand in FP8 bytes, for the four of a signed word."""
    top = 7 - weight.scheme.format.mantissa
    return (0x80 | 1 << top) * 0x01010101 - 2**32


def constants(weight: Packed) -> dict[str, Any]:
    """Compile-time arguments that belong to the format and the group size."""
    fmt = weight.scheme.format
    return {
        "UPPER": execution.UPPER[fmt],
        "MANTISSA": fmt.mantissa,
        "GROUP": weight.scheme.group_size,
    }


def is_even(weight: Packed) -> bool:
    """Whether the last block is full."""
    return weight.columns % execution.BLOCK == 0
