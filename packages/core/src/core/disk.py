"""Small files and folders: durable, replaced at once, and errors that say what was being done."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from core.errors import CheckpointError

TEMPORARY = ".tmp-"
"""Part of the name of every folder that is not committed yet."""


def sync(path: Path) -> None:
    """Make the bytes of a file durable, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path, content: bytes) -> None:
    """Write a small file and make its bytes durable."""
    path.write_bytes(content)
    sync(path)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file at once: a kill leaves the old one or the new one.

    Raises:
        CheckpointError: when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    with disk_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sync_file(temporary, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def plain_name(name: str) -> str:
    """Return ``name`` if it stays inside its folder.

    Raises:
        CheckpointError: for an absolute name, or one with ``..`` or a separator.
    """
    if name != Path(name).name or name in ("", ".", ".."):
        raise CheckpointError(f"{name!r} is no plain file name", why="it would leave the folder")
    return name


@contextmanager
def disk_errors(what: str) -> Generator[None]:
    """Turn an ``OSError`` into a :class:`CheckpointError` that says what was being done."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "free space or choose another disk" if error.errno in _DISK_FULL else ""
        raise CheckpointError(what, why=reason, fix=fix) from error


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in [path, *path.absolute().parents] if folder.exists())
