"""Searched scales never lose against those of the largest magnitudes, and heed what columns cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.errors import ModelError
from core_fp6.quality.searching import search
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.scaling import Scheme

SCHEMES = [Scheme(E2M3, 128), Scheme(E2M3, 0), Scheme(E3M2, 0), Scheme(E3M2, 32)]


def errors(weight, scheme, scale, importance=None):
    codes, _ = scheme.encode(weight, scale)
    squared = (scheme.decode(codes, scale, torch.float64) - weight).square()
    return squared if importance is None else squared * importance


@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_row_is_worse_than_rounded_to_nearest(scheme, rows, columns, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    importance = torch.rand(columns, generator=generator) if weighted else None
    found = search(weight, scheme, importance)
    assert found.dtype == scheme.scale_dtype
    assert found.shape == scheme.scale_shape(weight.shape)
    ours, usual = (
        errors(weight, scheme, scale, importance).sum(-1)
        for scale in (found, scheme.scales(weight))
    )
    assert bool((ours <= usual * (1 + 1e-6)).all())
    assert torch.equal(found, search(weight, scheme, importance))


def test_columns_that_cost_more_are_rounded_better():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.where(torch.arange(128) < 16, 100.0, 1.0)
    scheme = Scheme(E2M3, 128)
    plain, weighted = (search(weight, scheme, counts) for counts in (None, importance))
    dear = [errors(weight, scheme, scale)[:, :16].sum() for scale in (plain, weighted)]
    assert dear[1] < 0.9 * dear[0]


def test_experts_are_searched_one_by_one():
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(3, 64, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(E3M2, 32)
    found = search(weight, scheme, importance)
    for expert in range(3):
        assert torch.equal(found[expert], search(weight[expert], scheme, importance[expert]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"shape \[5\] for a weight of shape \[2, 4\]"):
        search(torch.ones(2, 4), Scheme(), torch.ones(5))
    with pytest.raises(ModelError, match="layer cannot be quantized"):
        search(torch.full((2, 4), torch.nan), Scheme(), name="layer")
