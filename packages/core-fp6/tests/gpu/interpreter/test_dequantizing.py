from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core_fp6.kernels import gpu
from core_fp6.kernels.gpu.dequantizing import dequantize
from core_fp6.weights.numbers import E2M3, E3M2, Format
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import ROW, Scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@pytest.mark.parametrize(
    ("fmt", "group"), [(E3M2, ROW), (E2M3, ROW), (E2M3, 32), (E2M3, 128), (E2M3, 256)]
)
@DTYPES
def test_weights_are_bit_equal_to_the_reference(
    fmt: Format, group: int, dtype: torch.dtype, weight_of: Callable[..., Packed]
) -> None:
    weight = weight_of(Scheme(fmt, group), 2, 37, 300)
    assert torch.equal(gpu.dequantize(weight, dtype), weight.dequantize(dtype))


@DTYPES
def test_codes_are_exact(dtype: torch.dtype, weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E3M2, ROW), 70, 513)
    values = dequantize(weight, dtype, scaled=False)
    assert torch.equal(values, E3M2.decode(weight.codes(), dtype))


def test_float64_is_left_to_the_reference(weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E2M3, 128), 7, 30)
    assert torch.equal(gpu.dequantize(weight, torch.float64), weight.dequantize(torch.float64))
