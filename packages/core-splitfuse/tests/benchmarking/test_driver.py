"""Requests are asked at the time of the clock, and tokens are noted when they come."""

from __future__ import annotations

import pytest

from core.engines import Token
from core.errors import EngineError
from core_splitfuse.benchmarking.clock import Clock
from core_splitfuse.benchmarking.driver import drive
from core_splitfuse.benchmarking.workload import ClosedLoop, OpenLoop, Query


class Metronome:
    """Makes one token of each request in a step of one second."""

    def __init__(self, finish="length", extra=0):
        self.time, self.running, self.most_at_once = 0.0, {}, 0
        self.finish, self.extra = finish, extra

    @property
    def busy(self):
        return bool(self.running)

    def add(self, request):
        number = int(self.time * 1000) + len(self.running)
        self.running[number] = request.sampling.max_new_tokens + self.extra
        self.most_at_once = max(self.most_at_once, len(self.running))
        return number

    def step(self):
        self.time += 1.0
        made = []
        for number in list(self.running):
            self.running[number] -= 1
            ended = not self.running[number]
            made.append(Token(request=number, id=7, finish=self.finish if ended else None))
            if ended:
                del self.running[number]
        return made

    def close(self):
        self.running.clear()


def run(load, **kind):
    engine = Metronome(**kind)
    return drive(engine, load, Clock(lambda: engine.time)), engine


def test_what_nobody_waits_for_takes_no_time():
    load = OpenLoop([Query([1], 2), Query([1, 2], 3)], [0.0, 100.0])
    (first, second), engine = run(load)
    assert first.times == [1.0, 2.0]
    assert second.times == [101.0, 102.0, 103.0]
    assert (second.arrived, second.first, second.latency, second.gaps) == (100, 1, 3, [1, 1])
    assert engine.time == 5.0


def test_who_arrives_during_a_step_waits_from_then_on():
    (_, second), engine = run(OpenLoop([Query([1], 4), Query([1], 1)], [0.0, 1.5]))
    assert second.arrived == 1.5
    assert second.first == 1.5
    assert engine.most_at_once == 2


def test_clients_ask_again_as_soon_as_they_are_answered():
    load = ClosedLoop([Query([1], n) for n in (2, 3, 1, 1, 2)], clients=2)
    records, engine = run(load)
    assert [r.arrived for r in records] == [0, 0, 2, 3, 3]
    assert engine.most_at_once == 2
    assert engine.time == 5.0


def test_a_clock_counts_from_where_it_began():
    seconds = iter([10.0, 11.0, 12.0, 12.0])
    clock = Clock(lambda: next(seconds))
    assert clock.now() == 1.0
    clock.skip_to(7.0)
    assert clock.now() == 7.0


@pytest.mark.parametrize(
    ("kind", "what"),
    [({"finish": "error"}, "ended with 'error'"), ({"extra": 1}, "3 tokens instead of 2")],
)
def test_answers_that_are_not_whole_are_no_figures(kind, what):
    with pytest.raises(EngineError, match=what):
        run(OpenLoop([Query([1], 2)], [0.0]), **kind)
