"""The operators keep torch's rules, and their gradients are those of the plain product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core_fp6 import ops
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import Scheme

SCHEMES = [Scheme(E2M3, 128), Scheme(E3M2, 0)]
TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def packed(*shape: int, scheme: Scheme = SCHEMES[0]) -> Packed:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantize(weight, scheme, layout="execution")


def arguments(weight: Packed) -> tuple[object, ...]:
    return weight.low, weight.high, weight.scale


def numbers(weight: Packed) -> tuple[object, ...]:
    return weight.scheme.format.name, weight.scheme.group_size, weight.columns


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(3, 300), (2, 5, 300), (0, 300)], ids=str)
def test_linear_keeps_the_rules_of_operators(scheme, bias, shape):
    weight = packed(37, 300, scheme=scheme)
    x = torch.randn(shape, requires_grad=True)
    b = torch.randn(37, requires_grad=True) if bias else None
    operands = (x, *arguments(weight), b, *numbers(weight))
    torch.library.opcheck(torch.ops.core_fp6.linear.default, operands, test_utils=TESTS)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_other_operators_keep_them_too(scheme):
    weight = packed(4, 37, 300, scheme=scheme)
    ends = torch.tensor([2, 2, 7, 10], dtype=torch.int32)
    x, grad = torch.randn(10, 300, requires_grad=True), torch.randn(10, 37)
    known = torch.ops.core_fp6
    for operator, operands in (
        (known.grouped_linear, (x, *arguments(weight), ends, *numbers(weight))),
        (known.grouped_backward, (grad, *arguments(weight), ends, *numbers(weight))),
        (known.dequantize, (*arguments(weight), *numbers(weight), torch.bfloat16)),
    ):
        torch.library.opcheck(operator.default, operands, test_utils=TESTS)


@given(
    scheme=st.sampled_from(SCHEMES),
    tokens=st.integers(0, 20),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    sliced=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_the_plain_product(scheme, tokens, rows, columns, sliced):
    weight = packed(rows, columns, scheme=scheme)
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randn(2, tokens, columns * 2, generator=generator)
    x = (whole[..., ::2] if sliced else whole[..., :columns]).requires_grad_()
    bias = torch.randn(rows, generator=generator).requires_grad_()
    grad = torch.randn(2, tokens, rows, generator=generator)
    ops.linear(x, weight, bias).backward(grad)
    exact = x.detach().double().requires_grad_()
    other = bias.detach().double().requires_grad_()
    matrix = weight.dequantize(torch.float64)
    torch.nn.functional.linear(exact, matrix, other).backward(grad.double())
    limit = 2e-6 * (grad.double().abs() @ matrix.abs()) + 1e-12
    assert bool(((x.grad - exact.grad).abs() <= limit).all())
    torch.testing.assert_close(bias.grad, other.grad.float(), rtol=1e-5, atol=1e-5)


def test_planes_in_another_layout_are_refused():
    weight = quantize(torch.ones(4, 8), SCHEMES[0])
    with pytest.raises(ValueError, match="execution"):
        ops.linear(torch.ones(1, 8), weight)
    with pytest.raises(ValueError, match=r"\[1, 9\] meets a weight of 8 columns"):
        ops.linear(torch.ones(1, 9), weight.to("execution"))
