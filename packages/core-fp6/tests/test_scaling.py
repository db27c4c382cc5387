"""Scales bring weights to the range of the codes, and nothing is lost on the way."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.errors import ModelError, SettingsError
from core_fp6.weights.numbers import E2M2, E2M3, E3M2
from core_fp6.weights.packed import checked, quantize
from core_fp6.weights.scaling import GROUP_SIZES, ROW, Scheme

SCHEMES = [Scheme(fmt, size) for fmt in (E3M2, E2M3) for size in (ROW, *GROUP_SIZES)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("columns", [1, 100, 512])
def test_scales_are_finite_positive_and_of_the_right_shape(scheme, columns):
    weight = torch.randn(2, 7, columns, generator=torch.manual_seed(0))
    weight[0, 3] = 0
    weight[1, 2] *= 1e-37
    weight[1, 4] *= 1e36
    scale = scheme.scales(weight)
    assert scale.shape == scheme.scale_shape(weight.shape)
    assert scale.dtype == scheme.scale_dtype
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    packed = quantize(weight, scheme)
    assert torch.equal(packed.dequantize()[0, 3], torch.zeros(columns))
    apart = (packed.dequantize(torch.float64) - weight).norm(dim=-1) / weight.norm(dim=-1)
    assert apart[0, :3].max() < 0.08
    # A row scale in float16 would have lost all of these.
    assert apart[1, 4] < 0.08


@given(
    columns=st.integers(1, 300),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 999),
    power=st.integers(-30, 30),
)
@settings(max_examples=100, deadline=None)
def test_no_weight_is_further_off_than_half_a_step(columns, scheme, seed, power):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, columns, generator=generator) * 2.0**power
    packed = quantize(weight, scheme)
    spread = scheme.spread(packed.scale, columns, torch.float64)
    fmt = scheme.format
    size = (weight.double() / spread).abs().clamp(max=fmt.max)
    step = torch.exp2(size.clamp(min=fmt.min_normal).log2().floor() - fmt.mantissa)
    apart = (packed.dequantize(torch.float64) - weight).abs() / spread
    # A scale that was rounded down to bfloat16 leaves the largest weights a 2^-8th too large.
    assert bool((apart <= step / 2 + fmt.max * 2.0**-8).all())


def test_codes_do_not_depend_on_the_dtype_that_holds_the_weight():
    weight = torch.randn(64, 256, generator=torch.manual_seed(0)).bfloat16()
    ours = [quantize(w, Scheme(E3M2, ROW)) for w in (weight, weight.float())]
    assert torch.equal(ours[0].codes(), ours[1].codes())
    assert torch.equal(ours[0].scale, ours[1].scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_count(bad):
    weight = torch.ones(4, 8)
    weight[1, 2:5] = bad
    with pytest.raises(ModelError, match=r"mlp\.up.*\n?.*3 of its 32"):
        quantize(weight, Scheme(), name="mlp.up")


def test_only_six_bits_are_packed():
    with pytest.raises(SettingsError, match="e2m2"):
        quantize(torch.ones(1, 4), Scheme(E2M2, ROW))
    with pytest.raises(SettingsError, match="no group size 100"):
        Scheme(E2M3, 100)


def test_bits_per_weight_count_the_scales():
    assert Scheme(E2M3, 128).bits_per_weight(4096) == 6.125
    assert Scheme(E3M2, ROW).bits_per_weight(4096) == 6 + 32 / 4096


@pytest.mark.parametrize("part", ["low", "high", "scale"])
@pytest.mark.parametrize("scheme", [Scheme(E2M3, 64), Scheme(E3M2, ROW)], ids=lambda s: s.name)
def test_planes_from_outside_are_checked(part, scheme):
    good = quantize(torch.randn(6, 200, generator=torch.manual_seed(0)), scheme)
    parts = {"low": good.low, "high": good.high, "scale": good.scale}
    again = checked(*parts.values(), scheme, 200, "layer.weight")
    assert torch.equal(again.dequantize(), good.dequantize())
    whole = parts[part]
    name = {"low": "weight", "high": "weight_hi", "scale": "weight_scale"}[part]
    parts[part] = whole[:-1] if part == "scale" else whole[..., :-1]
    with pytest.raises(ModelError, match=rf"layer\.{name} is not part of a {scheme.name} weight"):
        checked(*parts.values(), scheme, 200, "layer.weight")
    parts[part] = whole.to(torch.float64)
    with pytest.raises(ModelError, match="float64"):
        checked(*parts.values(), scheme, 200, "layer.weight")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_from_outside_have_to_be_scales(bad):
    good = quantize(torch.ones(2, 8), Scheme(E3M2, ROW))
    good.scale[1] = bad
    with pytest.raises(ModelError, match="no scales"):
        checked(good.low, good.high, good.scale, good.scheme, 8)
