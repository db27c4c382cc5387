"""System calls of Linux that Python does not offer."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any

_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_DIO_ALIGN_AT = 152
_AT_FDCWD = -100
_START_WRITING = 2


def direct_io_alignment(path: Path) -> tuple[int, int] | None:
    """What the kernel says of direct I/O on an existing file.

    Returns:
        alignment of memory and of file offsets in bytes, zeros where direct I/O is impossible, or
        ``None`` where kernel or file system do not say.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    name = os.fsencode(path)
    if _call("statx", _AT_FDCWD, name, 0, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", buffer, _DIO_ALIGN_AT)
    return memory, offset


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
    if _call("fallocate64", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Have the page cache of a range written to the disk, without waiting for it."""
    _call(
        "sync_file_range",
        descriptor,
        ctypes.c_int64(offset),
        ctypes.c_int64(length),
        _START_WRITING,
    )


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> int:
    """Result of a C function, or -1 with ``errno`` where the C library lacks it."""
    function = getattr(_libc(), name, None)
    if function is None:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    return int(function(*arguments))
