from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core_fp6.kernels import cpu
from core_fp6.weights.numbers import E2M3, E3M2, Format
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import GROUP_SIZES, ROW, Scheme

DTYPES = torch.bfloat16, torch.float16, torch.float32
TOKENS = 1, 2, 3, 5, 8, 9, 15, 16, 17, 33, 64, 512, 600
SCHEMES = [Scheme(fmt, size) for fmt in (E2M3, E3M2) for size in (ROW, *GROUP_SIZES)]


DEFAULT = Scheme()


def weight_of(rows: int, columns: int, scheme: Scheme = DEFAULT) -> Packed:
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(rows, columns, generator=generator), scheme, layout="execution")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_products_are_those_of_float64(forced, within, scheme):
    weight = weight_of(70, 300, scheme)
    bias = torch.randn(70)
    for tokens in TOKENS:
        for dtype in DTYPES:
            x = torch.randn(tokens, 300).to(dtype)
            within(cpu.linear(x, weight), x, weight)
            within(cpu.linear(x, weight, bias.to(dtype)), x, weight, bias.to(dtype))


@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 150),
    columns=st.integers(1, 700),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_will_do(forced, within, tokens, rows, columns, scheme, dtype):
    weight = weight_of(rows, columns, scheme)
    x = torch.randn(tokens, columns).to(dtype)
    within(cpu.linear(x, weight), x, weight)


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_long_rows_without_cancellation_stay_exact(forced, within, tokens):
    for scheme in (Scheme(E2M3, 128), Scheme(E2M3, 32), Scheme(E3M2, ROW)):
        for fill in (torch.rand(9, 11008), torch.full((9, 11008), 0.1)):
            weight = quantize(fill, scheme, layout="execution")
            for dtype in DTYPES:
                for x in (torch.rand(tokens, 11008), torch.full((tokens, 11008), 0.7)):
                    within(cpu.linear(x.to(dtype), weight), x.to(dtype), weight)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("fmt", [E2M3, E3M2], ids=lambda fmt: fmt.name)
def test_every_code_is_its_value(forced, fmt: Format, flush):
    codes = torch.arange(64, dtype=torch.uint8).repeat(3, 5)[:, :300]
    natural = quantize(torch.ones(3, 300), Scheme(fmt, ROW), scale=torch.ones(3))
    packed = quantize(fmt.decode(codes), Scheme(fmt, ROW), scale=torch.ones(3), layout="execution")
    assert torch.equal(packed.codes(), codes)
    assert natural.shape == packed.shape
    values = fmt.decode(codes, torch.float64)
    torch.set_flush_denormal(flush)
    try:
        for dtype in DTYPES:
            assert torch.equal(cpu.dequantize(packed, dtype).double(), values)
            for one_hot in torch.eye(300, dtype=dtype), *torch.eye(300, dtype=dtype).split(5)[:20]:
                columns = one_hot.argmax(1)
                assert torch.equal(cpu.linear(one_hot, packed).double().T, values[:, columns])
    finally:
        torch.set_flush_denormal(False)


def test_rows_need_not_be_contiguous(forced):
    weight = weight_of(33, 300)
    x = torch.randn(300, 14).bfloat16()
    assert torch.equal(cpu.linear(x.T[::2], weight), cpu.linear(x.T[::2].contiguous(), weight))


def test_float64_stays_float64(forced):
    weight = weight_of(33, 300)
    x = torch.randn(5, 300, dtype=torch.float64)
    exact = x @ weight.dequantize(torch.float64).T
    assert torch.allclose(cpu.linear(x, weight), exact, rtol=1e-13, atol=1e-12)


def test_infinities_and_nan_come_through(forced):
    weight = weight_of(33, 300)
    for tokens in (1, 20):
        x = torch.randn(tokens, 300)
        x[0, 7] = torch.nan
        assert bool(cpu.linear(x.bfloat16(), weight)[0].isnan().all())
        x[0, 7] = torch.inf
        found = cpu.linear(x, weight)
        assert not bool(found[0].isfinite().any())
        assert bool(found[1:].isfinite().all())


def test_what_does_not_fit_is_refused(forced):
    if forced == "eager":
        pytest.skip("torch checks the shapes itself")
    weight = weight_of(33, 512)
    x = torch.ones(2, 512)
    for wrong in (
        replace(weight, columns=1024),
        replace(weight, high=weight.high[:, :64]),
        replace(weight, scale=weight.scale[:, :1]),
        weight.to("natural"),
    ):
        with pytest.raises(ValueError, match="not the planes"):
            cpu.linear(x, wrong)
        with pytest.raises(ValueError, match="not the planes"):
            cpu.dequantize(wrong)
    with pytest.raises(ValueError, match="no product"):
        cpu.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="no product"):
        cpu.linear(x, weight, torch.ones(32))


def test_no_tokens_give_nothing(forced):
    assert cpu.linear(torch.ones(0, 300), weight_of(33, 300)).shape == (0, 33)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_dequantized_weights_are_those_of_the_definition(forced, scheme):
    experts = quantize(torch.randn(3, 20, 300), scheme, layout="execution")
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(cpu.dequantize(experts, dtype), experts.dequantize(dtype))


def test_tokens_go_to_their_experts(forced, within):
    experts = quantize(torch.randn(5, 33, 300), Scheme(E2M3, 128), layout="execution")
    x = torch.randn(40, 300).bfloat16()
    ends = torch.tensor([0, 3, 3, 39, 40], dtype=torch.int32)
    found = cpu.grouped_linear(x, experts, ends)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        alone = Packed(
            experts.low[expert],
            experts.high[expert],
            experts.scale[expert],
            experts.scheme,
            experts.columns,
            experts.layout,
        )
        within(found[begin:end], x[begin:end], alone)
        begin = end
