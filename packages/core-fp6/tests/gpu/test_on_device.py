"""What no interpreter can show: matrix units, graphs, the vendor's library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core_fp6 import ops
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import ROW, Scheme

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SCHEMES = pytest.mark.parametrize(
    "scheme", [Scheme(E2M3, 128), Scheme(E3M2, ROW), Scheme(E2M3, 32)], ids=lambda s: s.name
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def weight_of(scheme: Scheme, *shape: int) -> Packed:
    return quantize(torch.randn(shape, device="cuda") * 0.05, scheme, layout="execution")


def excess(out: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | float = 0.0) -> float:
    """How far an output is beyond one rounding and 2e-6 of the sum of magnitudes."""
    exact, size = x.double() @ matrix.double().T + bias, x.double().abs() @ matrix.double().abs().T
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 + 2e-6 * size
    return float(((out.double() - exact).abs() - allowed).max())


@SCHEMES
@DTYPES
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 100, 300, 512])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 2048), (333, 1000)])
def test_products_are_exact(
    scheme: Scheme, dtype: torch.dtype, tokens: int, rows: int, columns: int
) -> None:
    weight, bias = weight_of(scheme, rows, columns), torch.randn(rows, device="cuda")
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    out = ops.linear(x, weight, bias)
    assert excess(out, x, weight.dequantize(torch.float64), bias.double()) <= 0
    assert torch.equal(out, ops.linear(x, weight, bias))


@pytest.mark.parametrize("scheme", [Scheme(E3M2, ROW), Scheme(E2M3, 128)], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_many_tokens(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, 1024, 2048)
    x = torch.randn(1000, 2048, device="cuda").to(dtype)
    out = ops.linear(x, weight)
    exact = scheme.group_size == ROW
    matrix = weight.dequantize(torch.float64 if exact else dtype)
    # The library may add up groups of columns in another order, and rounds sums of its own.
    assert excess(out, x, matrix) <= (0 if exact else 1e-2)


@SCHEMES
@DTYPES
def test_all_codes_are_exact(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight_of(scheme, 64, 512)
    out = ops.linear(torch.eye(512, device="cuda", dtype=dtype), weight)
    assert torch.equal(out, weight.dequantize(dtype).T)


@SCHEMES
def test_a_captured_graph_follows_its_input(scheme: Scheme) -> None:
    weight = weight_of(scheme, 512, 4096)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    ops.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, ops.linear(x, weight))


@SCHEMES
@pytest.mark.parametrize("ends", [[0, 5, 5, 40], [10, 20, 30, 40], [40, 40, 40, 40]], ids=str)
def test_experts(scheme: Scheme, ends: list[int]) -> None:
    weight = weight_of(scheme, 4, 500, 1000)
    x = torch.randn(40, 1000, device="cuda").bfloat16()
    out = ops.grouped_linear(x, weight, torch.tensor(ends, dtype=torch.int32, device="cuda"))
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > begin:
            matrix = weight.dequantize(torch.float64)[expert]
            assert excess(out[begin:end], x[begin:end], matrix) <= 0


def test_fp8_activations_cost_little() -> None:
    from core_fp6.kernels import gpu

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no FP8 matrix units")
    weight = weight_of(Scheme(E2M3, 128), 1024, 2048)
    x = torch.randn(16, 2048, device="cuda").bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).T
    with gpu.fp8_activations():
        error = (ops.linear(x, weight).double() - exact).norm() / exact.norm()
    assert error < 0.04


def test_the_operator_is_sound() -> None:
    weight = weight_of(Scheme(E2M3, 128), 64, 300)
    x = torch.randn(3, 300, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    arguments = (x, weight.low, weight.high, weight.scale, None, "e2m3", 128, 300)
    torch.library.opcheck(torch.ops.core_fp6.linear.default, arguments)
