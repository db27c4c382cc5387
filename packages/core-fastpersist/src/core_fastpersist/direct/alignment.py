"""Whether direct I/O works in a folder, and how it must be aligned: asked, then really tried."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from core_fastpersist.direct.kernel import direct_io_alignment
from core_fastpersist.direct.memory import PAGE, pages

logger = logging.getLogger("core_fastpersist")
_lock = Lock()
_known: dict[int, Alignment] = {}
_PASSING = {
    os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EINTR)
}
"""Reasons that say nothing about the mount, and are not remembered."""


@dataclass(frozen=True)
class Alignment:
    """How files of one mount are written.

    Args:
        direct: whether a block was written and read back past the page cache.
        memory: bytes that addresses must be a multiple of.
        offset: bytes that file offsets and lengths must be a multiple of.
        reason: why direct I/O is impossible; empty where it is possible.
    """

    direct: bool
    memory: int = PAGE
    offset: int = PAGE
    reason: str = ""


def alignment_of(folder: Path) -> Alignment:
    """How direct I/O works in a folder; tried once for each mount.

    Args:
        folder: existing folder.
    """
    device = folder.stat().st_dev
    with _lock:
        if device in _known:
            return _known[device]
        found = _try(folder)
        if found.reason not in _PASSING:
            _known[device] = found
        return found


def refused(folder: Path, reason: str) -> None:
    """Remember that direct I/O failed in a folder after all, and warn once."""
    device = folder.stat().st_dev
    with _lock:
        known = _known.get(device, Alignment(direct=True))
        if known.direct:
            _known[device] = replace(known, direct=False, reason=reason)
            logger.warning(
                "direct I/O failed on the disk of %s (%s); writing through the page cache from now"
                " on, which is slower and as safe",
                folder,
                reason,
            )


def _try(folder: Path) -> Alignment:
    path = folder / f".direct-io-{uuid.uuid4().hex[:8]}.tmp"
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | direct_flag()
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        path.unlink(missing_ok=True)
        return Alignment(direct=False, reason=_reason(error))
    try:
        return _try_file(path, descriptor)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _try_file(path: Path, descriptor: int) -> Alignment:
    said = direct_io_alignment(path)
    if said == (0, 0):
        return Alignment(direct=False, reason="the file system has no direct I/O")
    block = os.fstat(descriptor).st_blksize
    memory, offset = said or (PAGE, PAGE)
    # A block less than the file system's own is legal and slow: the rest of it must be read first.
    found = Alignment(direct=True, memory=memory, offset=_multiple(offset, block))
    pattern = os.urandom(found.offset)
    written, read = pages(found.offset), pages(found.offset)
    written[:] = pattern
    try:
        if os.pwritev(descriptor, [written], 0) != found.offset:
            return replace(found, direct=False, reason="a block was written in part")
        os.preadv(descriptor, [read], 0)
    except OSError as error:
        return replace(found, direct=False, reason=_reason(error))
    if bytes(read) != pattern:
        return replace(found, direct=False, reason="a block came back changed")
    return found


def _multiple(offset: int, block: int) -> int:
    """The file system's block, where that is a sensible multiple of the smallest offset."""
    sensible = block % offset == 0 and block & (block - 1) == 0 and block <= 2**16
    return max(offset, block if sensible else PAGE)


def direct_flag() -> int:
    """``O_DIRECT``.

    Raises:
        OSError: outside of Linux.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        raise OSError(errno.ENOSYS, "this system has no O_DIRECT")
    return int(flag)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
