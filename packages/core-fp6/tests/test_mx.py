"""MXFP6 weights, as torchao makes them, are taken over unchanged."""

import pytest
import torch

from core.errors import ModelError
from core_fp6.weights import mx
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import quantize
from core_fp6.weights.scaling import Scheme

ELEMENTS = {E3M2: "fp6_e3m2", E2M3: "fp6_e2m3"}


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_a_weight_of_torchao_is_read_bit_for_bit(fmt):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = torch.randn(16, 256, dtype=torch.bfloat16, generator=torch.manual_seed(0))
    weight[3, 32:64] = 0
    made = mx_tensor.MXTensor.to_mx(weight, ELEMENTS[fmt], 32)
    read = mx.load(made.qdata, made.scale, fmt)
    assert torch.equal(read.dequantize(torch.bfloat16), made.dequantize(torch.bfloat16))
    ours = quantize(weight, Scheme(fmt, 32), scale=mx.scales(weight, fmt))
    assert torch.equal(ours.dequantize(), read.dequantize())


def test_scales_of_others_are_checked():
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    good = torch.full((2, 2), 127, dtype=torch.uint8)
    assert mx.load(codes, good, E3M2).scale.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ModelError, match=r"\[2, 3\], not \[2, 2\]"):
        mx.load(codes, torch.full((2, 3), 127, dtype=torch.uint8), E3M2)
    with pytest.raises(ModelError, match="NaN"):
        mx.load(codes, torch.full((2, 2), 255, dtype=torch.uint8), E3M2)
    with pytest.raises(ModelError, match="above 63"):
        mx.load(codes + 64, good, E3M2)
    with pytest.raises(ModelError, match="33 columns"):
        mx.scales(torch.zeros(2, 33), E3M2)
