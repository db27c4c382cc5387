"""Which answers count, by hand, by definition and by pandas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from core_splitfuse.benchmarking.driver import Record
from core_splitfuse.benchmarking.effective import (
    Promise,
    effective_throughput,
    moving_average,
    throughput,
)
from core_splitfuse.benchmarking.figures import figures, median, token_gaps

GAPS = st.lists(st.floats(0, 10), min_size=1, max_size=60)


def record(gaps, first=0.5, prompt=512, arrived=0.0):
    return Record(prompt, arrived, (arrived + first + np.cumsum([0.0, *gaps])).tolist())


@given(gaps=GAPS, span=st.integers(1, 32))
def test_the_average_is_weighted_by_what_there_is(gaps, span):
    alpha = 2 / (span + 1)
    found = moving_average(gaps, span)
    for last in range(len(gaps)):
        weights = (1 - alpha) ** np.arange(last, -1, -1)
        expected = np.average(gaps[: last + 1], weights=weights)
        assert found[last] == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def pandas():
    return pytest.importorskip("pandas")


@given(gaps=GAPS)
def test_the_average_is_that_of_pandas(pandas, gaps):
    expected = pandas.Series(gaps).ewm(span=16).mean().to_numpy()
    np.testing.assert_allclose(moving_average(gaps), expected, atol=1e-9)


def test_averages_by_hand():
    # span 3 halves the weights: (1 * 1 + 4 * 2) / 3, then (1 * 1 + 4 * 2 + 2 * 4) / 7
    np.testing.assert_allclose(moving_average([1.0, 4.0, 2.0], 3), [1, 3, 17 / 7])


def test_an_answer_keeps_its_promise_while_gaps_are_short_enough():
    promise = Promise(4)
    assert promise.kept(record([0.2] * 30))
    assert not promise.kept(record([0.25] * 30)), "as slow as promised is not faster"
    assert not promise.kept(record([0.3] + [0.01] * 30)), "the first gap stands alone"
    assert promise.kept(record([0.1] * 20 + [0.9] + [0.1] * 20))
    assert not promise.kept(record([0.1] * 20 + [0.9] * 3))


@pytest.mark.parametrize(("first", "kept"), [(1.0, True), (1.001, False)])
def test_readers_wait_a_second_for_512_tokens_of_prompt(first, kept):
    assert Promise(2).kept(record([0.1] * 5, first=first)) is kept
    assert Promise(2).kept_in_sum(record([0.1] * 5, first=first)) is kept


def test_in_sum_an_early_token_makes_up_for_a_late_one():
    gaps = [0.01] * 10 + [2.0]
    assert Promise(4).kept_in_sum(record(gaps))
    assert not Promise(4).kept(record(gaps))
    assert not Promise(4).kept_in_sum(record([0.26]))


def test_effective_throughput_is_the_share_that_kept_it():
    good, bad = record([0.1] * 9), record([0.9] * 9, arrived=1.0)
    last = 1.0 + 0.5 + 8.1
    assert throughput([good, bad]) == pytest.approx(2 / last)
    assert effective_throughput([good, bad], Promise(4)) == pytest.approx(1 / last)


def test_first_and_last_tokens_and_requests_are_left_out():
    records = [record([9.0] * 3), record([0.1, 0.2, 9.0]), record([0.3, 9.0]), record([9.0] * 3)]
    assert token_gaps(records) == pytest.approx([0.1, 0.2, 0.3])


def test_medians_are_those_of_each_figure():
    runs = [figures([record([gap] * 8)] * 3, rates=(2.0, 4.0)) for gap in (0.1, 0.2, 0.4)]
    middle = median(runs)
    assert middle.gap95 == pytest.approx(0.2)
    assert middle.tokens == runs[1].tokens
    assert middle.effective == (runs[1].effective[0], runs[1].effective[1])
    assert runs[2].effective[1] == 0.0
    assert len(middle.effective_in_sum) == 2
