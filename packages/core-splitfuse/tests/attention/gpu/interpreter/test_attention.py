"""Paged attention is that of the reference, whatever is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import Plan, Rotation, Spread, attend

CPU = torch.device("cpu")
SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 18))),
    min_size=1,
    max_size=3,
)
SPREADS = st.sampled_from([Spread(1), Spread(8, least_keys=16), Spread(1, split_tokens=16)])
HYPOTHESIS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HYPOTHESIS
@given(data=st.data())
def test_every_shape_and_rule(data, case_of, asked, assert_exact) -> None:
    group, key_heads = data.draw(
        st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (8, 1), (7, 1), (20, 1)])
    )
    dim, value_dim = data.draw(st.sampled_from([(16, 16), (24, 16), (8, 8), (40, 24), (64, 32)]))
    spans = [asked(begin, begin + count) for begin, count in data.draw(SPANS)]
    heads = group * key_heads
    rule = Rule(
        scaling=data.draw(st.sampled_from([0.5, 0.2])),
        window=data.draw(st.sampled_from([None, 1, 7, 16, 100])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        sinks=data.draw(st.sampled_from([None, torch.randn(heads), torch.full((heads,), 5.0)])),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    block_size = data.draw(st.sampled_from([16, 32, 128]))
    case = case_of(heads, key_heads, dim, value_dim, block_size, spans, dtype)
    query, plan = case.queries(), Plan.make(spans, block_size, CPU, spread=data.draw(SPREADS))
    out = attend(query, case.keys, case.values, plan, rule)
    assert_exact(out, query, case, plan, rule)


@HYPOTHESIS
@given(
    spans=SPANS,
    interleaved=st.booleans(),
    turned=st.sampled_from([8, 16, 24]),
    ratios=st.booleans(),
    window=st.sampled_from([None, 9]),
    spread=SPREADS,
    group=st.sampled_from([1, 2]),
)
def test_keys_are_turned_in_registers(
    spans, interleaved, turned, ratios, window, spread, group, case_of, asked, assert_exact
) -> None:
    asked_spans = [asked(begin, begin + count) for begin, count in spans]
    case = case_of(2 * group, 2, 24, 16, 16, asked_spans)
    query, plan = case.queries(), Plan.make(asked_spans, 16, CPU, spread=spread)
    frequencies = 10000.0 ** -torch.linspace(0, 1, turned // 2).expand(2, -1) * torch.tensor(
        [[1.0], [0.5]]
    )
    lines = torch.arange(len(spans), dtype=torch.int32) % 2
    scales = torch.tensor([1.0, 1.19])
    by_head = torch.rand(len(spans), 2 * group) * 2 + 0.5 if ratios else None
    rotation = Rotation(frequencies, lines, scales, by_head, interleaved)
    rule = Rule(24**-0.5, window)
    out = attend(query, case.keys, case.values, plan, rule, rotation)
    assert_exact(
        out,
        query,
        case,
        plan,
        rule,
        frequencies=frequencies[lines.long()],
        scales=scales[lines.long()],
        ratios=by_head,
        interleaved=interleaved,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_all_dtypes(dtype, case_of, asked, assert_exact) -> None:
    spans = [asked(33, 34), asked(0, 9), asked(20, 30)]
    case = case_of(4, 2, 16, 16, 16, spans, dtype)
    query, plan = case.queries(), Plan.make(spans, 16, CPU)
    rule = Rule(0.25)
    out = attend(query, case.keys, case.values, plan, rule)
    assert_exact(out, query, case, plan, rule)


def test_angles_stay_exact_far_from_the_beginning(case_of, asked, assert_exact) -> None:
    spans = [asked(1200, 1201)]
    case = case_of(2, 1, 16, 16, 128, spans)
    query, plan = case.queries(), Plan.make(spans, 128, CPU)
    # As if the sequence stood at positions a hundred times as high: 120,000 radians.
    frequencies = torch.tensor([[1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4]])
    ratios = torch.full((1, 2), 0.01)
    rotation = Rotation(frequencies, torch.zeros(1, dtype=torch.int32), torch.ones(1), ratios)
    out = attend(query, case.keys, case.values, plan, Rule(0.25), rotation)
    assert_exact(
        out,
        query,
        case,
        plan,
        Rule(0.25),
        frequencies=frequencies,
        ratios=ratios,
    )


def test_splits_give_what_one_program_gives(case_of, asked) -> None:
    spans = [asked(70, 71), asked(90, 97), asked(0, 1)]
    case = case_of(4, 2, 16, 16, 16, spans)
    query = case.queries()
    rule = Rule(0.25, window=60, sinks=torch.randn(4))
    whole, split, fixed = (
        attend(query, case.keys, case.values, Plan.make(spans, 16, CPU, spread=spread), rule)
        for spread in (Spread(1), Spread(64, least_keys=16), Spread(1, split_tokens=16))
    )
    torch.testing.assert_close(split, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(fixed, whole, rtol=0, atol=2e-6)


def test_fixed_splits_do_not_depend_on_neighbours(case_of, asked) -> None:
    spans = [asked(300, 301), asked(200, 203), asked(0, 40), asked(25, 26)]
    case = case_of(2, 1, 16, 16, 16, spans)
    query, spread = case.queries(), Spread(8, split_tokens=128)
    together = attend(
        query, case.keys, case.values, Plan.make(spans, 16, CPU, spread=spread), Rule(0.25)
    )
    row = 0
    for span in spans:
        rows = slice(row, row + span.end - span.begin)
        plan = Plan.make([span], 16, CPU, spread=spread)
        alone = attend(query[rows], case.keys, case.values, plan, Rule(0.25))
        assert torch.equal(together[rows], alone)
        row = rows.stop


def test_a_prompt_in_chunks_is_the_prompt_in_one(case_of, asked) -> None:
    whole = asked(0, 45)
    case = case_of(4, 2, 16, 16, 16, [whole])
    query = case.queries()
    out = attend(query, case.keys, case.values, Plan.make([whole], 16, CPU), Rule(0.25))
    for begin, end in ((0, 13), (13, 14), (14, 32), (32, 45)):
        plan = Plan.make([asked(begin, end, whole.table)], 16, CPU)
        part = attend(query[begin:end], case.keys, case.values, plan, Rule(0.25))
        torch.testing.assert_close(part, out[begin:end], rtol=0, atol=2e-6)


def test_shapes_that_do_not_fit_are_refused(case_of, asked) -> None:
    spans = [asked(0, 4)]
    case = case_of(4, 2, 16, 16, 16, spans)
    plan = Plan.make(spans, 16, CPU)
    with pytest.raises(ValueError, match="not the 4 of the plan"):
        attend(case.queries(5), case.keys, case.values, plan, Rule(1.0))
    with pytest.raises(ValueError, match="do not fit keys"):
        attend(case.queries().half(), case.keys, case.values, plan, Rule(1.0))
    with pytest.raises(EngineError, match="float64"):
        attend(case.queries().double(), case.keys, case.values, plan, Rule(1.0))
    with pytest.raises(ValueError, match="do not fit together"):
        attend(case.queries(), case.keys, case.values[1:], plan, Rule(1.0))
    with pytest.raises(ValueError, match="without gaps"):
        attend(case.queries(), case.keys[:, ::2], case.values[:, ::2], plan, Rule(1.0))
