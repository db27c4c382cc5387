"""Which kernel computes a product: chosen by the number of tokens, without asking the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from core.triton import made_current
from core_fp6.kernels import reference
from core_fp6.kernels.gpu import dequantizing, fused, grouped, library
from core_fp6.kernels.gpu.configs import Config, Device, default
from core_fp6.kernels.gpu.settings import wants_fp8
from core_fp6.kernels.gpu.tuned import LIBRARY, Choice, Key, chosen
from core_fp6.weights.packed import Packed

FUSED_TOKENS = 512
"""Beyond so many tokens decoding to memory is the smaller part of the work."""
_INTERPRETER = Device("interpreter", 4, 2**20)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Added up in float32 and rounded once; beyond ``FUSED_TOKENS`` tokens a weight with scales of
    groups is rounded to the dtype of ``x`` first.

    Args:
        x: ``[tokens, columns]``, any strides; float64 is computed by the reference.
        weight: ``[rows, columns]`` in the layout of kernels.
        bias: ``[rows]`` or None.
    """
    if x.dtype == torch.float64:
        return reference.linear(x, weight, bias)
    fp8 = wants_fp8(x.device)
    choice = choose(x, weight, fp8)
    with made_current(x):
        if isinstance(choice, Config):
            return fused.linear(x.contiguous(), weight, bias, choice, fp8)
        return library.linear(x.contiguous(), weight, bias)


def grouped_linear(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """``x[begin:end] @ weight[expert].T`` for every expert.

    Args:
        x: ``[tokens, columns]``, the tokens of an expert side by side, in the order of experts.
        weight: ``[experts, rows, columns]`` in the layout of kernels.
        ends: int32 ``[experts]``: where the tokens of each expert end.
    """
    if x.dtype == torch.float64:
        return reference.grouped_linear(x, weight, ends)
    experts, rows, columns = weight.shape
    fp8 = wants_fp8(x.device)
    itemsize = 1 if fp8 else x.dtype.itemsize
    share = -(-x.shape[0] // experts)
    config = default(share, rows, columns, itemsize, device_of(x.device))
    with made_current(x):
        return grouped.grouped_linear(x.contiguous(), weight, ends, config, fp8)


def dequantize(weight: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of codes: multiplied in float32 and rounded once; float64 by the reference."""
    if dtype == torch.float64:
        return weight.dequantize(dtype)
    with made_current(weight.low):
        return dequantizing.dequantize(weight, dtype)


def choose(x: Tensor, weight: Packed, fp8: bool) -> Choice:
    """What was measured to be fastest, else a guess."""
    tokens, (rows, columns) = x.shape[0], weight.shape
    device = device_of(x.device)
    if tokens > FUSED_TOKENS and not fp8:
        return LIBRARY
    key = Key.of(device.name, tokens, rows, columns, x.dtype, weight.scheme.name, fp8)
    itemsize = 1 if fp8 else x.dtype.itemsize
    return chosen(key) or default(tokens, rows, columns, itemsize, device)


@functools.cache
def device_of(device: torch.device) -> Device:
    """Name and sizes of a device."""
    if device.type != "cuda":
        return _INTERPRETER
    found: Any = torch.cuda.get_device_properties(device)
    return Device(found.name, found.multi_processor_count, found.shared_memory_per_block_optin)
