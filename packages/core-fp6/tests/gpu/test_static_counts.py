"""Instructions of the inner loop for compute capability 9.0, counted without such a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.scaling import ROW, Scheme

triton = pytest.importorskip("triton")
if triton.knobs.nvidia.nvdisasm is None or not Path(triton.knobs.nvidia.nvdisasm.path).is_file():
    pytest.skip("this Triton comes without NVIDIA's disassembler", allow_module_level=True)

from core_fp6.kernels.gpu.configs import Config  # noqa: E402
from core_fp6.kernels.gpu.static import counts  # noqa: E402

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (Scheme(E2M3, 128), torch.bfloat16),
        (Scheme(E2M3, 128), torch.float16),
        (Scheme(E3M2, ROW), torch.float16),
        (Scheme(E3M2, ROW), torch.bfloat16),
        (Scheme(E2M3, 64), torch.bfloat16),
        (Scheme(E2M3, 256), torch.bfloat16),
        (Scheme(E3M2, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_decoding_leaves_time_to_load(scheme: Scheme, dtype: torch.dtype) -> None:
    found = counts(scheme, dtype, Config(128, 16))
    assert found.integer <= 2.3
    assert found.instructions <= 4.6
    assert found.spills == 0


@pytest.mark.parametrize("scheme", [Scheme(E2M3, 128), Scheme(E3M2, ROW)], ids=lambda s: s.name)
def test_fp8_needs_half_of_it(scheme: Scheme) -> None:
    found = counts(scheme, FP8, Config(128, 16))
    assert found.integer <= 0.9
    assert found.instructions <= 2.0
    assert found.spills == 0


def test_ragged_columns_and_splits_cost_little() -> None:
    found = counts(Scheme(E2M3, 128), torch.bfloat16, Config(128, 16, splits=4), even=False)
    assert found.integer <= 2.3
    assert found.instructions <= 4.6
    assert found.spills == 0


def test_values_stay_in_their_registers() -> None:
    found = counts(Scheme(E3M2, ROW), torch.bfloat16, Config(128, 16))
    assert found.shared_stores == 0
