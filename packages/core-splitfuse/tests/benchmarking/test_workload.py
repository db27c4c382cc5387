"""Loads follow from their seed, and look like the paper's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from core.errors import SettingsError
from core_splitfuse.benchmarking.workload import Lengths, closed, poisson, queries


@given(seed=st.integers(0, 50), count=st.integers(1, 30))
def test_the_same_seed_asks_the_same(seed, count):
    lengths = Lengths(40, 10)
    first, again = (poisson(lengths, count, 2.0, 100, seed) for _ in range(2))
    assert first == again
    assert len(first.queries) == len(first.arrivals) == count
    assert first.arrivals == sorted(first.arrivals)
    assert poisson(lengths, count, 2.0, 100, seed + 1).queries != first.queries


def test_lengths_are_normal_around_their_means():
    found = queries(Lengths(2600, 128), 3000, 1000, seed=0)
    prompts = np.array([len(query.prompt) for query in found])
    answers = np.array([query.answer for query in found])
    assert prompts.mean() == pytest.approx(2600, rel=0.02)
    assert prompts.std() == pytest.approx(0.3 * 2600, rel=0.05)
    assert answers.mean() == pytest.approx(128, rel=0.02)
    assert prompts.max() <= 2 * 2600
    assert answers.max() <= 2 * 128
    assert prompts.min() >= 8


def test_prompts_are_slices_of_one_text_that_begin_differently():
    found = queries(Lengths(50, 10), 20, 1000, seed=3)
    for index, query in enumerate(found[1:], 1):
        before = found[index - 1].prompt
        shared = min(len(before) - 1, len(query.prompt))
        assert list(before[1 : 1 + shared]) == list(query.prompt[:shared])
    assert len({tuple(query.prompt[:8]) for query in found}) == 20


def test_arrivals_come_at_the_rate_that_was_asked_for():
    found = poisson(Lengths(8, 4), 4000, 5.0, 100, seed=0).arrivals
    pauses = np.diff(found)
    assert found[0] == 0.0
    assert pauses.mean() == pytest.approx(1 / 5, rel=0.05)
    assert pauses.std() == pytest.approx(1 / 5, rel=0.05)


def test_clients_begin_one_after_the_other():
    load = closed(Lengths(20, 5), 10, 3, 100, seed=0, stagger=0.5)
    assert list(load.begin()) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert list(closed(Lengths(20, 5), 2, 3, 100, seed=0).begin()) == [(0, 0.0), (1, 0.0)]


def test_lengths_that_measure_nothing_are_refused():
    with pytest.raises(SettingsError, match="measure nothing"):
        Lengths(300, 2)
