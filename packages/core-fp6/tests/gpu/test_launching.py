"""Arguments of all launches, up to compiled code for compute capability 9.0; nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import ROW, Scheme

triton = pytest.importorskip("triton")

from core_fp6.kernels import gpu  # noqa: E402
from core_fp6.kernels.gpu import fused, library  # noqa: E402
from core_fp6.kernels.gpu.configs import Config  # noqa: E402


class NoDevice:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> Any:
        return triton.compiler.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 9999  # kernels remember what they compiled for a device

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of the kernels that were compiled instead of launched."""
    names: list[str] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(size >= 1 for size in grid)
        assert all(size <= 65535 for size in grid[1:])
        names.append(self.fn.__name__)
        assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]

    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return lambda: names


def weight_of(scheme: Scheme, *shape: int) -> Packed:
    return quantize(torch.randn(shape), scheme, layout="execution")


@pytest.mark.parametrize("tokens", [1, 16])
def test_fused_products(tokens: int, compiled: Callable[[], list[str]]) -> None:
    x = torch.randn(tokens, 512).bfloat16()
    gpu.linear(x, weight_of(Scheme(E2M3, 128), 256, 512), torch.randn(256))
    assert compiled()[0] == "linear_kernel"


def test_splits(compiled: Callable[[], list[str]]) -> None:
    weight = weight_of(Scheme(E3M2, ROW), 100, 1000)
    fused.linear(torch.randn(3, 1000).half(), weight, torch.randn(100), Config(64, 16, 2))
    assert compiled() == ["linear_kernel", "finish_kernel"]


def test_fp8_activations(compiled: Callable[[], list[str]]) -> None:
    with gpu.fp8_activations():
        gpu.linear(torch.randn(3, 512).bfloat16(), weight_of(Scheme(E2M3, 128), 100, 512))
    assert compiled()[:2] == ["quantize_kernel", "linear_kernel"]


def test_experts(compiled: Callable[[], list[str]]) -> None:
    ends = torch.tensor([1, 5], dtype=torch.int32)
    gpu.grouped_linear(torch.randn(5, 256).half(), weight_of(Scheme(E2M3, 128), 2, 64, 256), ends)
    assert compiled() == ["grouped_kernel"]


def test_the_library(compiled: Callable[[], list[str]]) -> None:
    library.linear(torch.zeros(5, 300), weight_of(Scheme(E2M3, ROW), 64, 300), None)
    assert compiled() == ["dequantize_kernel", "finish_kernel"]
