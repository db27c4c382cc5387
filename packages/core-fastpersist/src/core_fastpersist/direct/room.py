"""A disk that has no room, told with what is needed and what is free."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from core.errors import CheckpointError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path, size: int) -> Generator[None]:
    """Turn whatever the disk says while a file is written into one error.

    Args:
        path: the file.
        size: bytes that it needs.

    Raises:
        CheckpointError: naming the file, and bytes needed and free where there is no room.
    """
    try:
        yield
    except OSError as error:
        raise _told(path, size, error) from error
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_ROOM:
            raise
        raise _told(path, size, error.__cause__) from error.__cause__


def _told(path: Path, size: int, error: OSError) -> CheckpointError:
    reason = error.strerror or str(error)
    if error.errno not in _NO_ROOM:
        return CheckpointError(f"cannot write {path}", why=reason)
    taken = path.stat().st_blocks * 512 if path.is_file() else 0
    free = shutil.disk_usage(path.parent).free + taken
    return CheckpointError(
        f"no room for {path}",
        why=f"{reason}: {size:,} bytes are needed, {free:,} are free",
        fix="free space or choose another disk",
    )
