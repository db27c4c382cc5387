"""Every kernel compiles for every kind of device, also where sizes are one and become constants."""

from __future__ import annotations

import pytest
import torch

from core_fp6.layouts.execution import UPPER
from core_fp6.weights.numbers import E2M3
from core_fp6.weights.scaling import ROW, Scheme

pytest.importorskip("triton")

from core_fp6.kernels.gpu import activations, dequantizing, finishing, fused, grouped
from core_fp6.kernels.gpu.arguments import OPERANDS
from core_fp6.kernels.gpu.configs import Config
from core_fp6.kernels.gpu.static import compiled, counts

ONE_WARP_GROUP = {"num_warps": 4, "num_stages": 3}
PLANES = {"low_ptr": "i32", "high_ptr": "i32"}
CODES = {"UPPER": UPPER[E2M3], "MANTISSA": 3, "GROUP": 128}
TILE = {"DTYPE": OPERANDS[torch.bfloat16], "EVEN": False, "ROWS": 64, "TOKENS": 16, "WARPS": 4}


@pytest.mark.parametrize(
    ("capability", "scheme", "dtype", "config"),
    [
        (80, Scheme(E2M3, 128), torch.bfloat16, Config(128, 16)),
        (89, Scheme(E2M3, 128), torch.float8_e4m3fn, Config(128, 16)),
        (90, Scheme(E2M3, 32), torch.float32, Config(64, 16)),
        (90, Scheme(E2M3, 128), torch.bfloat16, Config(128, 128, warps=8, stages=2)),
        (100, Scheme(E2M3, 128), torch.bfloat16, Config(128, 16)),
    ],
    ids=str,
)
def test_the_fused_kernel(
    capability: int, scheme: Scheme, dtype: torch.dtype, config: Config
) -> None:
    assert counts(scheme, dtype, config, capability=capability).instructions > 0


def test_the_fused_kernel_for_a_weight_of_one_row_and_one_block() -> None:
    pointers = {**PLANES, "x_ptr": "bf16", "scale_ptr": "bf16", "token_scale_ptr": "bf16"}
    pointers |= {"bias_ptr": "fp32", "out_ptr": "bf16"}
    ones = {"rows": 1, "columns": 1, "blocks": 1, "groups": 1}
    constants = {**CODES, **TILE, **ones, "BIAS": True, "SPLITS": 2}
    assert compiled(fused.linear_kernel, pointers, constants, ONE_WARP_GROUP)


@pytest.mark.parametrize("ones", [{}, {"experts": 1, "rows": 1, "blocks": 1, "groups": 1}])
def test_the_kernel_of_experts(ones: dict[str, int]) -> None:
    pointers = {**PLANES, "x_ptr": "bf16", "scale_ptr": "bf16", "token_scale_ptr": "bf16"}
    pointers |= {"ends_ptr": "i32", "out_ptr": "bf16"}
    constants = {**CODES, **TILE, **ones, "EXPERTS": 1 if ones else 8}
    assert compiled(grouped.grouped_kernel, pointers, constants, ONE_WARP_GROUP)


@pytest.mark.parametrize("ones", [{}, {"rows": 1, "columns": 1, "blocks": 1, "groups": 1}])
@pytest.mark.parametrize("group", [ROW, 32])
def test_the_kernel_that_dequantizes(ones: dict[str, int], group: int) -> None:
    pointers = {**PLANES, "scale_ptr": "bf16" if group else "fp32", "out_ptr": "fp16"}
    constants = {**CODES, **ones, "GROUP": group, "SCALED": True, "ROWS": 64, "WARPS": 4}
    assert compiled(dequantizing.dequantize_kernel, pointers, constants, {"num_warps": 4})


@pytest.mark.parametrize("ones", [{}, {"rows": 1, "stride": 1}])
def test_the_kernel_that_adds_splits(ones: dict[str, int]) -> None:
    pointers = {"sums_ptr": "fp32", "scale_ptr": "fp32", "bias_ptr": "bf16", "out_ptr": "bf16"}
    constants = {**ones, "SPLITS": 4, "SCALED": True, "BIAS": True, "BLOCK": 1024}
    assert compiled(finishing.finish_kernel, pointers, constants, {"num_warps": 4})


@pytest.mark.parametrize("ones", [{}, {"columns": 1}])
def test_the_kernel_that_rounds_activations(ones: dict[str, int]) -> None:
    pointers = {"x_ptr": "bf16", "out_ptr": "fp8e4nv", "scale_ptr": "fp32"}
    constants = {**ones, "BLOCK": 1024}
    assert compiled(activations.quantize_kernel, pointers, constants, {"num_warps": 4})
