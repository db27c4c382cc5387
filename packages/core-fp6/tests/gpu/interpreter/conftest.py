from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import Scheme

# Only test_interpreter.py starts pytest so that the kernels are interpreted.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

Exact = Callable[[Tensor, Tensor, Packed, Tensor | None], None]


@pytest.fixture(autouse=True)
def _seed_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def weight_of() -> Callable[..., Packed]:
    """Weights of a shape whose rows differ in size and have codes of all sizes."""

    def made(scheme: Scheme, *shape: int) -> Packed:
        values = torch.randn(shape) * torch.logspace(-3, 1, shape[-2]).unsqueeze(-1)
        return quantize(values, scheme, layout="execution")

    return made


@pytest.fixture
def assert_exact() -> Exact:
    """One rounding to the output dtype and 2e-6 of the sum of magnitudes are allowed."""

    def check(out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None) -> None:
        matrix = weight.dequantize(torch.float64)
        exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        assert out.shape == exact.shape
        assert out.dtype == x.dtype
        finfo = torch.finfo(x.dtype)
        rounding = (exact.abs() * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
        worst = ((out.double() - exact).abs() - rounding - 2e-6 * size).max()
        assert worst <= 0, f"{worst} beyond what rounding explains"

    return check
