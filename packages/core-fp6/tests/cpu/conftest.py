from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from core.errors import SettingsError
from core_fp6.kernels import cpu
from core_fp6.weights.packed import Packed

Within = Callable[[Tensor, Tensor, Packed, Tensor | None], None]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORE_FP6_CACHE", str(tmp_path_factory.mktemp("libraries")))
        yield


@pytest.fixture(params=["avx512", "avx2", "plain", "eager"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        cpu.force(request.param)
    except SettingsError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.force(None)


@pytest.fixture(scope="session")
def within() -> Within:
    """One rounding to the dtype, and 2e-6 of the sum of magnitudes, around the exact product."""

    def check(out: Tensor, x: Tensor, weight: Packed, bias: Tensor | None = None) -> None:
        exact_weight = weight.dequantize(torch.float64)
        exact = x.double() @ exact_weight.T
        size = x.double().abs() @ exact_weight.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        of = torch.finfo(out.dtype)
        rounding = exact.abs().clamp(min=of.smallest_normal) * of.eps / 2
        assert out.dtype == x.dtype
        assert out.shape == exact.shape
        assert bool(((out.double() - exact).abs() <= rounding + 2e-6 * size).all())

    return check
