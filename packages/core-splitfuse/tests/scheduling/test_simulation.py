"""The paper's own curve of what a pass costs, and what packing does to the latency of tokens."""

from __future__ import annotations

import pytest

from core_splitfuse.benchmarking.simulation import PAPER, simulate
from core_splitfuse.benchmarking.workload import Lengths
from core_splitfuse.scheduling.cost import Load
from core_splitfuse.settings import SplitFuseSettings

WAYS = {
    "split": SplitFuseSettings(budget=768),
    "paper": SplitFuseSettings(budget=768, mode="paper"),
    "prefill_first": SplitFuseSettings(budget=2048, mode="prefill_first"),
}


def best_at_four_tokens(found, way):
    """Most effective queries a second at 4 tokens/s, over all numbers of clients."""
    return max(found.median(load, way).effective[1] for load in found.loads)


@pytest.fixture(scope="module")
def sixteen():
    found = simulate(WAYS, [16], lengths=Lengths(2600, 128))
    return {way: found.median("16 clients", way) for way in WAYS}


@pytest.mark.parametrize("way", ["split", "paper"])
def test_the_slowest_tokens_come_three_and_a_half_times_sooner(sixteen, way):
    assert sixteen["prefill_first"].gap95 >= 3.5 * sixteen[way].gap95
    assert sixteen[way].gap95 < 0.1
    assert sixteen[way].gap50 == pytest.approx(sixteen["prefill_first"].gap50, rel=0.1)


@pytest.mark.parametrize("way", ["split", "paper"])
def test_as_many_are_answered_in_the_same_time(sixteen, way):
    assert sixteen[way].queries > sixteen["prefill_first"].queries


def test_one_and_a_half_times_as_many_answers_are_good_enough():
    found = simulate(WAYS, [8, 12, 16, 20], lengths=Lengths(2600, 60), requests=120)
    assert best_at_four_tokens(found, "split") > 1.5 * best_at_four_tokens(found, "prefill_first")
    assert best_at_four_tokens(found, "split") > 2.7


def test_a_time_budget_serves_well_past_saturation():
    ways = {
        "small": SplitFuseSettings(budget=256),
        "fixed": SplitFuseSettings(budget=768),
        "time": SplitFuseSettings(budget=2048, latency=0.2),
    }
    found = simulate(ways, [32], lengths=Lengths(2600, 60))
    small, fixed, timed = (found.median("32 clients", way) for way in ways)
    assert small.effective[1] < 0.3 < fixed.effective[1]
    assert timed.effective[1] > 1.5 * fixed.effective[1]
    assert timed.effective[1] > 2.5
    assert timed.gap_max < 0.25


@pytest.mark.parametrize("clients", [2, 4, 16])
def test_a_time_budget_costs_no_throughput(clients):
    ways = {
        "fixed": SplitFuseSettings(budget=768),
        "time": SplitFuseSettings(budget=768, latency=0.1),
    }
    found = simulate(ways, [clients], lengths=Lengths(2600, 60), requests=120)
    fixed, timed = (found.median(f"{clients} clients", way) for way in ways)
    assert timed.queries > 0.95 * fixed.queries


def test_nothing_is_left_to_chance():
    first, again = (simulate(WAYS, [4], lengths=Lengths(200, 10), requests=20) for _ in range(2))
    assert first.runs == again.runs


def test_the_curve_goes_through_its_points_and_rises_beyond():
    assert PAPER.cost(Load(768, 0, 1)) == pytest.approx(0.094)
    assert PAPER.cost(Load(4096, 0, 1)) == pytest.approx(2 * 0.257)
    assert PAPER.cost(Load(64, 10**6, 1)) == pytest.approx(0.022 + 0.05)
