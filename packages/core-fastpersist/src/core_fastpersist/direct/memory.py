"""Aligned memory: what direct I/O reads into and writes from."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, suppress

PAGE = mmap.PAGESIZE
_KEPT = 64 * 2**20
_lock = threading.Lock()
_free: defaultdict[int, list[memoryview]] = defaultdict(list)


def pages(size: int, *, touch: bool = False) -> memoryview:
    """Allocate zero-filled memory that begins at a page.

    Huge pages are asked for: a first touch then costs one fault for 2 MiB, which on virtual machines
    is the larger part of what reading a checkpoint into new memory takes.

    Args:
        size: bytes.
        touch: have all of it backed by real memory now, not at its first use.

    Returns:
        a writable view of ``size`` bytes, which keeps the memory alive.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return _view(mmap.mmap(-1, max(size, 1), flags=flags), size, touch)


def shared_pages(descriptor: int, size: int) -> memoryview:
    """Map a file of memory (``os.memfd_create``) that another process can map, too.

    Raises:
        OSError: when the file is smaller.
    """
    return _view(mmap.mmap(descriptor, max(size, 1)), size, touch=False)


def address(view: memoryview) -> int:
    """Address of the first byte of a view."""
    if view.nbytes == 0:
        return 0
    if view.readonly:
        # ctypes asks for writable memory; a pointer to constant bytes is found through the buffer.
        return _address_of_readonly(view)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@contextmanager
def buffer(size: int) -> Generator[memoryview]:
    """Borrow aligned memory that is used again, so that it is touched once only."""
    with _lock:
        found = _free[size].pop() if _free[size] else None
    view = pages(size, touch=True) if found is None else found
    try:
        yield view
    finally:
        with _lock:
            if sum(kept * len(views) for kept, views in _free.items()) + size <= _KEPT:
                _free[size].append(view)


def _view(mapping: mmap.mmap, size: int, touch: bool) -> memoryview:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    if touch:
        for start in range(0, len(view), PAGE):
            view[start] = 0
    return view[:size]


def _address_of_readonly(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
