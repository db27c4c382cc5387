from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core_fp6.kernels import gpu
from core_fp6.kernels.gpu import dispatch, fused, library
from core_fp6.kernels.gpu.configs import Config
from core_fp6.layouts import execution
from core_fp6.weights.numbers import E2M3, E3M2, Format
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import ROW, Scheme

FORMATS = pytest.mark.parametrize("fmt", [E2M3, E3M2], ids=lambda fmt: fmt.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@FORMATS
@DTYPES
@pytest.mark.parametrize("group", [ROW, 32, 64, 128, 256])
def test_all_schemes_and_dtypes(
    fmt: Format, dtype: torch.dtype, group: int, weight_of: Callable[..., Packed], assert_exact
) -> None:
    weight = weight_of(Scheme(fmt, group), 37, 300)
    x, bias = torch.randn(3, 300).to(dtype), torch.randn(37)
    assert_exact(fused.linear(x, weight, bias, Config(64, 16)), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (65, 511), (128, 513)])
@pytest.mark.parametrize("scheme", [Scheme(E2M3, 128), Scheme(E3M2, ROW)], ids=lambda s: s.name)
def test_any_shape(
    tokens: int,
    rows: int,
    columns: int,
    scheme: Scheme,
    weight_of: Callable[..., Packed],
    assert_exact,
) -> None:
    weight = weight_of(scheme, rows, columns)
    x = torch.randn(tokens, columns).bfloat16()
    assert_exact(gpu.linear(x, weight), x, weight, None)


@pytest.mark.parametrize(
    "config", [Config(64, 32), Config(128, 16), Config(128, 16, warps=8), Config(256, 16, warps=8)]
)
def test_all_sizes_of_tiles(config: Config, weight_of: Callable[..., Packed], assert_exact) -> None:
    weight = weight_of(Scheme(E2M3, 64), 150, 260)
    x = torch.randn(20, 260).half()
    assert_exact(fused.linear(x, weight, None, config), x, weight, None)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_are_exact_and_give_the_same_bits_again(
    splits: int, weight_of: Callable[..., Packed], assert_exact
) -> None:
    weight = weight_of(Scheme(E2M3, 128), 40, 1300)
    x, bias = torch.randn(5, 1300).bfloat16(), torch.randn(40).bfloat16()
    config = Config(64, 16, splits)
    out = fused.linear(x, weight, bias, config)
    assert_exact(out, x, weight, bias)
    assert torch.equal(out, fused.linear(x, weight, bias, config))


@FORMATS
@DTYPES
def test_every_code_is_exact(fmt: Format, dtype: torch.dtype) -> None:
    codes = torch.arange(64, dtype=torch.uint8).repeat(64, 4)
    low, high = execution.pack(codes, fmt)
    weight = Packed(low, high, torch.ones(64), Scheme(fmt, ROW), 256, "execution")
    x = torch.zeros(64, 256, dtype=dtype)
    x[torch.arange(64), torch.arange(64) * 4 + 3] = 1
    out = fused.linear(x, weight, None, Config(64, 64))
    wanted = fmt.decode(codes, dtype)[:, torch.arange(64) * 4 + 3].T
    assert torch.equal(out, wanted)


@FORMATS
def test_every_column_meets_its_own_weight(fmt: Format) -> None:
    columns = 512
    codes = torch.randint(0, 64, (64, columns), dtype=torch.uint8)
    low, high = execution.pack(codes, fmt)
    weight = Packed(low, high, torch.ones(64), Scheme(fmt, ROW), columns, "execution")
    out = fused.linear(torch.eye(columns).half(), weight, None, Config(64, 128))
    assert torch.equal(out, fmt.decode(codes, torch.float16).T)


def test_float32_keeps_infinities_and_extreme_numbers(weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E2M3, ROW), 5, 256)
    column = weight.dequantize(torch.float64)[:, 0]
    assert column.all()
    x = torch.zeros(4, 256)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = torch.inf, 1e37, 1e-30, torch.nan
    out = fused.linear(x, weight, None, Config(64, 16)).double()
    assert torch.equal(out[0], torch.inf * column.sign())
    assert torch.allclose(out[1], 1e37 * column, rtol=1e-6)
    assert torch.allclose(out[2], 1e-30 * column, rtol=1e-6, atol=0)
    assert bool(torch.isnan(out[3]).all())


def test_inputs_may_have_gaps(weight_of: Callable[..., Packed], assert_exact) -> None:
    weight = weight_of(Scheme(E2M3, 128), 20, 300)
    x = torch.randn(300, 6).half().T
    assert_exact(gpu.linear(x, weight), x, weight, None)


@pytest.mark.parametrize("group", [ROW, 64])
def test_many_tokens_take_the_library(
    group: int, weight_of: Callable[..., Packed], assert_exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FUSED_TOKENS", 16)
    monkeypatch.setattr(library, "WORKSPACE", 4 * 300 * 15)
    weight = weight_of(Scheme(E2M3, group), 37, 300)
    x, bias = torch.randn(20, 300), torch.randn(37)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "linear", None)
        assert_exact(gpu.linear(x, weight, bias), x, weight, bias)


def test_float64_is_left_to_the_reference(weight_of: Callable[..., Packed]) -> None:
    weight = weight_of(Scheme(E2M3, 128), 7, 30)
    x = torch.randn(2, 30, dtype=torch.float64)
    assert torch.equal(gpu.linear(x, weight), x @ weight.dequantize(torch.float64).T)
