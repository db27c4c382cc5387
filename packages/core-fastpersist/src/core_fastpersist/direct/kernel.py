"""What direct I/O and large memory need of Linux and Python does not offer."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from pathlib import Path

from core.system import call, libc

_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_DIO_ALIGN_AT = 152
_AT_FDCWD = -100
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAP_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_FIXED = 0x10
_PROT_NONE = 0
HUGE_PAGE = 2 * 2**20


def direct_io_alignment(path: Path) -> tuple[int, int] | None:
    """What the kernel says of direct I/O on an existing file.

    Returns:
        alignment of memory and of file offsets in bytes, zeros where direct I/O is impossible, or
        ``None`` where kernel or file system do not say.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    name = os.fsencode(path)
    if call("statx", _AT_FDCWD, name, 0, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", buffer, _DIO_ALIGN_AT)
    return memory, offset


def use_huge_pages(descriptor: int, size: int) -> bool:
    """Touch the memory of a ``memfd`` and have it consist of huge pages.

    Direct I/O takes a huge page as one piece: the same bytes cost a third of the processor time
    and a few interrupts. Most systems offer none for shared memory by themselves. On request
    Linux 6.1 makes them where a mapping is aligned to them, and they stay when it is gone. That
    takes no longer than the first touch of small pages, which it replaces.

    Args:
        descriptor: the file.
        size: bytes, a multiple of :data:`HUGE_PAGE`.

    Returns:
        whether the kernel did it.
    """
    reserved = _map(None, size + HUGE_PAGE, _PROT_NONE, _MAP_PRIVATE_ANONYMOUS, -1)
    if reserved is None:
        return False
    aligned = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        return (
            _map(aligned, size, access, mmap.MAP_SHARED | _MAP_FIXED, descriptor) is not None
            and _advise(aligned, size, _MADV_POPULATE_WRITE)
            and _advise(aligned, size, _MADV_COLLAPSE)
        )
    finally:
        call("munmap", ctypes.c_void_p(reserved), ctypes.c_size_t(size + HUGE_PAGE))


def _map(address: int | None, size: int, access: int, flags: int, descriptor: int) -> int | None:
    """Address of a new mapping, or ``None`` where the kernel refuses."""
    function = libc().mmap
    function.restype = ctypes.c_void_p
    place, nothing = ctypes.c_void_p(address), ctypes.c_int64(0)
    found = function(place, ctypes.c_size_t(size), access, flags, descriptor, nothing)
    return None if found == ctypes.c_void_p(-1).value else int(found)


def _advise(address: int, size: int, advice: int) -> bool:
    return call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0
