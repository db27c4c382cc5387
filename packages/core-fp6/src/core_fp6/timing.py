"""Times of several ways to do the same, taken in turn so that a busy machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch

_LEAST = 3


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted.

    Args:
        ways: what to do, by name.
        rounds: how often.
        limit: seconds after which no further round begins, but for the first three.
        clock: seconds on the wall, or ``time.process_time`` for those of all processors.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + limit
    for number in range(rounds + 1):
        if number > _LEAST and time.perf_counter() > end:
            break
        for name, work in ways.items():
            began = clock()
            work()
            if number:
                seconds[name].append(clock() - began)
    return seconds


@contextmanager
def one_thread() -> Generator[None]:
    """Let torch compute in a single thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
