"""Roundings of other libraries, done by those libraries: what six bits are held against."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

TORCHAO = "torchao"
BITSANDBYTES = "bitsandbytes"


def integers(weight: Tensor, bits: int, group_size: int, asymmetric: bool) -> Tensor:
    """Integers of ``bits`` bits for rows or groups of columns, as torchao rounds them.

    Args:
        weight: float32 ``[rows, columns]``, and so is what all functions here return.
        bits: 1 to 8.
        group_size: columns that share a scale, 0 for a whole row.
        asymmetric: with a zero point.
    """
    torchao: Any = import_module("torchao.quantization")
    mapping = torchao.MappingType.ASYMMETRIC if asymmetric else torchao.MappingType.SYMMETRIC
    filled = _filled(weight, group_size)
    stored = torchao.IntxUnpackedToInt8Tensor.from_hp(
        filled,
        (1, group_size or weight.shape[-1]),
        getattr(torch, f"int{bits}"),
        mapping_type=mapping,
    )
    return _cut(stored.dequantize(), weight)


def float8(weight: Tensor) -> Tensor:
    """FP8 E4M3 with a float32 scale per row, as torch rounds it."""
    fp8 = torch.float8_e4m3fn
    largest = weight.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / torch.finfo(fp8).max)
    return (weight / scale).to(fp8).float() * scale


def microscaling(weight: Tensor, element: str) -> Tensor:
    """MX blocks of 32 columns with power-of-two scales, rounded down as OCP MX 1.0 has it.

    Args:
        weight: float32 ``[rows, columns]``.
        element: name of a six-bit format, such as ``e2m3``.
    """
    torchao: Any = import_module("torchao.prototype.mx_formats.mx_tensor")
    stored = torchao.MXTensor.to_mx(_filled(weight, 32), f"fp6_{element}", 32)
    return _cut(stored.dequantize(torch.float32), weight)


def normal_float(weight: Tensor) -> Tensor:
    """NF4 of QLoRA (arXiv 2305.14314) in blocks of 64, as bitsandbytes rounds it."""
    functional: Any = import_module("bitsandbytes.functional")
    stored, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return cast(Tensor, functional.dequantize_4bit(stored, state))


def _filled(weight: Tensor, group_size: int) -> Tensor:
    return pad(weight, (0, -weight.shape[-1] % group_size)) if group_size else weight


def _cut(values: Any, weight: Tensor) -> Tensor:
    return cast(Tensor, values[..., : weight.shape[-1]])
