from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core_fp6.kernels import gpu
from core_fp6.kernels.gpu.activations import in_fp8
from core_fp6.kernels.reference import expert_of
from core_fp6.weights.numbers import E2M3, E3M2, Format
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import ROW, Scheme


def rounded(x: Tensor) -> Tensor:
    """What per-token FP8 leaves of activations."""
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize("fmt", [E2M3, E3M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("group", [ROW, 32, 64, 128, 256])
def test_products_of_rounded_activations(
    fmt: Format, group: int, weight_of: Callable[..., Packed]
) -> None:
    weight = weight_of(Scheme(fmt, group), 37, 300)
    x, bias = torch.randn(5, 300), torch.randn(37)
    with gpu.fp8_activations():
        out = gpu.linear(x, weight, bias)
    near, matrix = rounded(x), weight.dequantize(torch.float64)
    size = near.abs() @ matrix.abs().T + bias.abs()
    assert ((out - near @ matrix.T - bias).abs() <= 2e-6 * size).all()


def test_experts_with_rounded_activations(weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E2M3, 128), 2, 20, 300)
    x = torch.randn(5, 300)
    with gpu.fp8_activations():
        out = gpu.grouped_linear(x, weight, torch.tensor([2, 5], dtype=torch.int32))
    for expert, rows in enumerate((slice(0, 2), slice(2, 5))):
        matrix, near = expert_of(weight, expert).dequantize(torch.float64), rounded(x[rows])
        size = near.abs() @ matrix.abs().T
        assert ((out[rows] - near @ matrix.T).abs() <= 2e-6 * size).all()


def test_what_is_no_number_stays_none(weight_of: Callable[..., Packed]) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = torch.nan
    with gpu.fp8_activations():
        out = gpu.linear(x, weight_of(Scheme(E2M3, ROW), 8, 64))
    assert bool(torch.isfinite(out[0]).all())
    assert bool(torch.isnan(out[1]).all())


def test_zeros_and_the_largest_value_stay_what_they_are() -> None:
    x = torch.zeros(3, 300)
    x[1, 7], x[2, :] = -5.0, 65504.0
    values, scale = in_fp8(x)
    assert bool(torch.isfinite(values.float()).all())
    # One part of 64 places holds each column once, so sums tell that nothing is lost.
    assert torch.equal(values.float().sum(1) * scale, torch.tensor([0.0, -5.0, 65504.0 * 300]))
