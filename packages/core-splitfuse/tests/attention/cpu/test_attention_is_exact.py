"""Whatever the shapes, blocks and rules: the result is that of float64, rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core_splitfuse.attention.dense import Rule

DTYPES = torch.float32, torch.bfloat16


@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_will_do(native, world, near, data):
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    width = draw(st.integers(1, 100))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=4)
    )
    case = world(
        lengths,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=width,
        value_width=draw(st.one_of(st.just(width), st.integers(1, 100))),
        dtype=draw(st.sampled_from(DTYPES)),
        block=draw(st.integers(1, 40)),
    )
    rule = Rule(
        width**-0.5,
        window=draw(st.none() | st.integers(1, 150)),
        softcap=draw(st.none() | st.floats(1, 50)),
        sinks=draw(st.sampled_from([None, torch.linspace(-3, 3, kv_heads * group)])),
    )
    near(case.attend(rule), case.exact(rule))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 2500])
def test_long_sequences_are_computed_in_parts(native, world, near, dtype, window):
    case = world([(5000, 1), (2040, 3), (2047, 1), (2048, 1), (70, 1)], dtype=dtype)
    for rule in (Rule(0.25, window), Rule(0.25, window, sinks=torch.ones(4))):
        near(case.attend(rule), case.exact(rule))


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 1), (71, 1), (66, 2)])
def test_large_groups_are_computed_in_slices(native, world, near, heads, kv_heads):
    case = world([(50, 3), (300, 1)], heads=heads, kv_heads=kv_heads)
    near(case.attend(Rule(0.25)), case.exact(Rule(0.25)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_prompts_are_computed_too(forced, world, near, dtype):
    if forced == "torch" and dtype == torch.bfloat16:
        pytest.skip("torch rounds more than once")
    case = world([(0, 150), (30, 90)], dtype=dtype, width=64, value_width=64)
    near(case.attend(Rule(0.125)), case.exact(Rule(0.125)))


def test_large_scores_do_not_overflow(native, world, near):
    case = world([(100, 2), (0, 5)], scale=12.0)
    for softcap in (None, 30.0):
        rule = Rule(1.0, softcap=softcap)
        found, exact = case.attend(rule), case.exact(rule)
        for one, wanted in zip(found, exact, strict=True):
            # A float score of several hundred is off by some 1e-5.
            assert torch.allclose(one.double(), wanted, rtol=0, atol=2e-3)


def test_queries_and_keys_of_other_strides_are_read_as_they_are(native, world):
    case, rule = world([(20, 4)]), Rule(0.25)
    wanted = case.attend(rule)
    case.queries = [query.mT.contiguous().mT for query in case.queries]
    case.keys = [key.transpose(0, 1).contiguous().transpose(0, 1) for key in case.keys]
    assert torch.equal(case.attend(rule)[0], wanted[0])


def test_what_is_not_seen_does_no_harm(native, world, near):
    case, rule = world([(200, 1)]), Rule(0.25, window=20)
    exact = case.exact(rule)
    for rows in (*case.keys, *case.values):
        rows[:, :181] = torch.nan
    near(case.attend(rule), exact)


def test_nan_comes_through_to_its_sequence_alone(native, world):
    case = world([(40, 1), (40, 1)])
    case.keys[0][0, 7] = torch.nan
    broken, whole = case.attend(Rule(0.25))
    assert bool(broken[:, :2].isnan().all())
    assert bool(broken[:, 2:].isfinite().all())
    assert bool(whole.isfinite().all())
