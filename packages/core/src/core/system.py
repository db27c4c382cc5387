"""System calls of Linux that Python does not offer; elsewhere they do nothing."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Any

_START_WRITING = 2


def preallocate(descriptor: int, size: int) -> bool:
    """Reserve the blocks of a file, and let it grow to ``size`` bytes.

    Not ``os.posix_fallocate``, which writes zeros where the file system cannot reserve.

    Returns:
        whether the file system can do that.

    Raises:
        OSError: when there is no room.
    """
    if size == 0:
        return True
    if call("fallocate64", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Have the page cache of a range written to the disk, without waiting for it."""
    call(
        "sync_file_range",
        descriptor,
        ctypes.c_int64(offset),
        ctypes.c_int64(length),
        _START_WRITING,
    )


@cache
def libc() -> Any:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """Result of a C function, or -1 with ``errno`` where the C library lacks it."""
    function = getattr(libc(), name, None)
    if function is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    return int(function(*arguments))
