"""Any number of heads is shared by any number of ranks, and every query head finds its keys."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, strategies as st

from core.errors import ModelError
from core_fpdt.parallel.heads import HeadPlan


@st.composite
def plans(draw: st.DrawFn) -> HeadPlan:
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    return HeadPlan(kv_heads * group, kv_heads, draw(st.integers(1, kv_heads * group)))


@given(plans())
def test_every_head_of_queries_is_on_one_rank(plan: HeadPlan) -> None:
    own = [plan.queries(rank) for rank in range(plan.ranks)]
    assert list(chain(*own)) == list(range(plan.heads))
    sizes = [len(heads) for heads in own]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(plans())
def test_queries_find_the_keys_that_they_read_in_the_model(plan: HeadPlan) -> None:
    for rank in range(plan.ranks):
        own, keys = plan.queries(rank), list(plan.keys(rank))
        repeats = plan.repeats(rank)
        if repeats is not None:
            assert len(repeats) == len(keys)
            keys = [key for key, count in zip(keys, repeats, strict=True) for _ in range(count)]
        assert len(own) % len(keys) == 0
        readers = len(own) // len(keys)
        for place, head in enumerate(own):
            assert keys[place // readers] == head // (plan.heads // plan.kv_heads)


@given(plans())
def test_keys_are_repeated_only_where_kernels_need_it(plan: HeadPlan) -> None:
    for rank in range(plan.ranks):
        group = plan.heads // plan.kv_heads
        counts = [
            sum(head // group == key for head in plan.queries(rank)) for key in plan.keys(rank)
        ]
        assert (plan.repeats(rank) is None) == (len(set(counts)) == 1)


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="5 ranks cannot share the 4 attention heads") as refused:
        HeadPlan(4, 2, 5)
    assert refused.value.fix == "let 4 ranks at most share a sequence"
    assert HeadPlan(4, 2, 4).ranks == 4


def test_heads_of_keys_divide_those_of_queries() -> None:
    with pytest.raises(ValueError, match="3 heads of keys do not divide 4"):
        HeadPlan(4, 3, 2)
