"""Shared memory of huge pages holds what shared memory of small pages holds."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from core_fastpersist.direct.kernel import HUGE_PAGE, use_huge_pages
from core_fastpersist.direct.memory import shared_pages
from core_fastpersist.direct.remote import SharedArena


def test_memory_stays_what_it_was_when_its_pages_become_huge() -> None:
    descriptor = os.memfd_create("test")
    size = 3 * HUGE_PAGE
    os.ftruncate(descriptor, size)
    before = shared_pages(descriptor, size)
    before[HUGE_PAGE - 2 : HUGE_PAGE + 2] = b"abcd"
    use_huge_pages(descriptor, size)
    after = shared_pages(descriptor, size)
    assert after[HUGE_PAGE - 2 : HUGE_PAGE + 2] == b"abcd"
    assert after.tobytes().count(0) == size - 4
    before[-1] = 1
    assert after[-1] == 1
    os.close(descriptor)


def test_a_kernel_that_refuses_is_no_error() -> None:
    assert not use_huge_pages(-1, HUGE_PAGE)


def test_the_address_space_is_given_back() -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, HUGE_PAGE)
    use_huge_pages(descriptor, HUGE_PAGE)
    before = _mapped()
    for _ in range(20):
        use_huge_pages(descriptor, HUGE_PAGE)
    assert _mapped() - before < HUGE_PAGE
    os.close(descriptor)


def test_an_arena_has_at_least_the_bytes_that_were_asked_for_and_all_are_zero() -> None:
    for size in (0, 1, mmap.PAGESIZE, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1):
        arena = SharedArena(size)
        assert arena.size >= size
        assert len(arena.view) == arena.size == os.fstat(arena.descriptor).st_size
        assert not any(arena.view.tobytes())
        assert arena.place_of(arena.view[-1:]) == arena.size - 1
        arena.close()


def _mapped() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
