"""Regions of page-locked memory, through a runtime that is not there."""

from __future__ import annotations

import gc
import logging

import pytest

from core_fpdt.store.budget import Budget
from core_fpdt.store.counters import Counters
from core_fpdt.store.host import Pinned
from core_fpdt.store.slabs import Slabs

PAGE = 4096


class Runtime:
    """Locks as long as it may, and knows what is locked."""

    def __init__(self, most: int) -> None:
        self.locked: dict[int, int] = {}
        self.most = most

    def lock(self, address: int, nbytes: int) -> int:
        if sum(self.locked.values()) + nbytes > self.most:
            return 2
        self.locked[address] = nbytes
        return 0

    def unlock(self, address: int) -> None:
        del self.locked[address]


def _slabs(runtime: Runtime, limit: int = 2**30) -> Slabs:
    budget = Budget(limit, "host memory", "raise fpdt.host_memory")
    pinned = Pinned(runtime.lock, runtime.unlock)
    return Slabs(pinned, budget, Counters(), region=16 * PAGE)


def test_blocks_are_carved_without_waste_and_used_again() -> None:
    runtime = Runtime(2**30)
    slabs = _slabs(runtime)
    size = 5 * 256  # no power of two
    first = [slabs.take(size) for _ in range(51)]
    assert sum(runtime.locked.values()) == 51 * size
    places = {area.data.data_ptr() for area in first}
    assert len(places) == 51
    for number, area in enumerate(first):
        area.data.fill_(number)
    assert all((area.data == number).all() for number, area in enumerate(first))
    for area in first:
        slabs.give(area)
    assert {slabs.take(size).data.data_ptr() for _ in range(51)} == places


def test_a_block_larger_than_a_region_is_a_region() -> None:
    runtime = Runtime(2**30)
    slabs = _slabs(runtime)
    assert slabs.take(100 * PAGE).data.nbytes == slabs.reserved == 100 * PAGE


def test_the_last_region_is_as_large_as_the_budget_lets_it() -> None:
    slabs = _slabs(Runtime(2**30), limit=20 * PAGE)
    for _ in range(20):
        slabs.take(PAGE)
    assert slabs.reserved == 20 * PAGE


def test_everything_is_unlocked_by_close_and_by_the_collector() -> None:
    for collected in (False, True):
        runtime = Runtime(2**30)
        slabs = _slabs(runtime)
        slabs.give(slabs.take(PAGE))
        assert runtime.locked
        if collected:
            del slabs
            gc.collect()
        else:
            slabs.close()
        assert not runtime.locked


def test_memory_that_cannot_be_locked_is_used_as_it_is_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = Runtime(most=20 * PAGE)
    slabs = _slabs(runtime)
    with caplog.at_level(logging.WARNING, logger="core"):
        areas = [slabs.take(PAGE) for _ in range(64)]
    for number, area in enumerate(areas):
        area.data.fill_(number)
    assert all((area.data == number).all() for number, area in enumerate(areas))
    (message,) = caplog.messages
    assert "65,536 bytes cannot be page-locked (error 2; 65,536 are)" in message
    for area in areas:
        slabs.give(area)
    slabs.close()
    assert not runtime.locked
