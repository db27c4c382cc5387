from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core_fp6.kernels import gpu
from core_fp6.kernels.gpu import grouped
from core_fp6.kernels.gpu.configs import Config
from core_fp6.kernels.reference import expert_of
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import ROW, Scheme


@pytest.mark.parametrize(
    "ends",
    [[0, 17, 17, 20, 23], [23, 23, 23, 23, 23], [0, 0, 0, 0, 23], [16, 16, 17, 18, 23]],
    ids=str,
)
@pytest.mark.parametrize("scheme", [Scheme(E2M3, 128), Scheme(E3M2, ROW)], ids=lambda s: s.name)
def test_every_token_meets_its_expert(
    ends: list[int], scheme: Scheme, weight_of: Callable[..., Packed], assert_exact
) -> None:
    weight = weight_of(scheme, 5, 37, 300)
    x = torch.randn(23, 300).bfloat16()
    out = grouped.grouped_linear(x, weight, torch.tensor(ends, dtype=torch.int32), Config(64, 16))
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            assert_exact(out[begin:end], x[begin:end], expert_of(weight, expert), None)
        begin = end


@pytest.mark.parametrize("group", [ROW, 32, 64, 256])
def test_single_tokens_and_single_experts(
    group: int, weight_of: Callable[..., Packed], assert_exact
) -> None:
    weight = weight_of(Scheme(E2M3, group), 1, 20, 257)
    x = torch.randn(1, 257).half()
    out = gpu.grouped_linear(x, weight, torch.tensor([1], dtype=torch.int32))
    assert_exact(out, x, expert_of(weight, 0), None)


def test_tokens_of_no_expert_are_zero(weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E2M3, 128), 3, 20, 64)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    out = gpu.grouped_linear(torch.randn(6, 64).half(), weight, ends)
    assert not out[4:].any()
    assert out[:4].all()
