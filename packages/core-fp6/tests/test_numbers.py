"""Codes are those of ml_dtypes, and their values are exact in every dtype that can hold them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from core.errors import SettingsError
from core_fp6.weights.numbers import E2M2, E2M3, E3M2, Format, parse

SIX = {E3M2: ml_dtypes.float6_e3m2fn, E2M3: ml_dtypes.float6_e2m3fn}
FORMATS = [Format(e, m) for e in range(1, 5) for m in range(7) if 1 + e + m <= 8]


def theirs(fmt: Format, values: torch.Tensor) -> np.ndarray:
    return values.float().numpy().astype(SIX[fmt]).view(np.uint8)


@pytest.mark.parametrize("fmt", SIX, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_half_has_the_code_of_ml_dtypes(fmt, dtype):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    np.testing.assert_array_equal(fmt.encode(values).numpy(), theirs(fmt, values))


@pytest.mark.parametrize("fmt", SIX, ids=lambda f: f.name)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=64))
@settings(max_examples=200, deadline=None)
def test_floats_have_the_codes_of_ml_dtypes(fmt, values):
    single = torch.tensor(values, dtype=torch.float32)
    np.testing.assert_array_equal(fmt.encode(single).numpy(), theirs(fmt, single))


@pytest.mark.parametrize("fmt", SIX, ids=lambda f: f.name)
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_codes_have_their_exact_values(fmt, flush, dtype):
    wanted = np.arange(64, dtype=np.uint8).view(SIX[fmt]).astype(np.float64)
    torch.set_flush_denormal(flush)
    try:
        found = fmt.decode(torch.arange(64, dtype=torch.uint8), dtype)
    finally:
        torch.set_flush_denormal(False)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.double().numpy(), wanted)
    assert np.signbit(found[32].double().numpy())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_value_of_any_format_comes_back(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8 if fmt.bits < 8 else torch.int32)
    codes = codes.to(torch.uint8)
    values = fmt.decode(codes)
    assert torch.equal(fmt.encode(values), codes)
    assert values.max() == fmt.max
    assert values[values > 0].min() == min(fmt.min_subnormal, fmt.min_normal)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(value=st.floats(-600, 600, width=32))
@example(value=12.0)
@settings(max_examples=50, deadline=None)
def test_the_nearest_value_is_taken_and_the_even_one_of_two(fmt, value):
    code = int(fmt.encode(torch.tensor([value]))[0])
    values = torch.tensor(fmt.values(), dtype=torch.float64)
    apart = (values - value).abs()
    assert apart[code] == apart.min()
    nearest = [c for c in torch.nonzero(apart == apart.min()).flatten().tolist() if values[c] != 0]
    if len(nearest) == 2:
        assert code == max(nearest) if fmt.mantissa == 0 else code % 2 == 0


def test_what_is_too_large_becomes_the_largest():
    assert E3M2.decode(E3M2.encode(torch.tensor([29.0, 1e30, -1e30]))).tolist() == [28, 28, -28]
    assert E2M2.decode(E2M2.encode(torch.tensor([1e4]))).tolist() == [7]


@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m2", "e4m3"])
def test_formats_are_found_by_name(name):
    assert parse(name).name == name


@pytest.mark.parametrize("name", ["fp6", "e9m9", "e0m5", "e4m4", "E3M2", ""])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(SettingsError, match="no format"):
        parse(name)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        E3M2.encode(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="does not hold"):
        Format(6, 1).decode(torch.zeros(1, dtype=torch.uint8), torch.float16)
