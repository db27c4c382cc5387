"""Byte sinks and sources: how bytes get from memory into a folder and back.

Checkpoint writers and converters are written against these two protocols, so that a faster carrier
(direct I/O, a remote store) serves all of them. The default is buffered files that become visible
at once: written beside the target, synced, renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from core.contributions import Storage
from core.errors import CheckpointError

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp-"
"""Part of the name of every folder that is not committed yet."""


class ByteSink(Protocol):
    """A folder that is being written. Nothing is visible at its final path before ``commit()``.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> sink = FileSink(target)
        >>> sink.open("data", size=5)
        >>> sink.write_at("data", 3, b"lo")
        >>> sink.write_at("data", 0, b"hel")
        >>> target.exists()
        False
        >>> sink.commit()
        >>> (target / "data").read_bytes()
        b'hello'
    """

    def open(self, name: str, size: int) -> None:
        """Create the file ``name`` with ``size`` bytes; what is not written stays zero."""

    def write_at(self, name: str, offset: int, data: Buffer) -> None:
        """Write ``data`` at byte ``offset``; any order, any thread, no overlap.

        Raises:
            CheckpointError: outside of the file's size, or when the disk refuses.
        """

    def commit(self) -> None:
        """Make everything durable and then visible at once; returns when both are done."""

    def abort(self) -> None:
        """Remove everything written; harmless after ``commit()``."""


class ByteSource(Protocol):
    """An existing folder that is read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "data").write_bytes(b"hello")
        >>> source, buffer = FileSource(folder), bytearray(3)
        >>> source.read_into("data", 2, buffer)
        >>> bytes(buffer), source.size("data")
        (b'llo', 5)
    """

    def size(self, name: str) -> int:
        """Size of the file ``name`` in bytes."""
        ...

    def read_into(self, name: str, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` on.

        Raises:
            CheckpointError: when the file ends before the buffer is full.
        """

    def close(self) -> None:
        """Close what is open."""


class FileSink:
    """Buffered files in a temporary folder beside ``path``; fsync and rename on commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
        self._files: dict[str, tuple[int, int]] = {}
        self._committed = False
        with disk_errors(f"cannot create {self._temporary}"):
            self._temporary.mkdir(parents=True)

    def open(self, name: str, size: int) -> None:
        path = self._temporary / plain_name(name)
        with disk_errors(f"cannot create {path} with {size:,} bytes"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._files[name] = descriptor, size
            os.truncate(descriptor, size)

    def write_at(self, name: str, offset: int, data: Buffer) -> None:
        descriptor, size = self._files[name]
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > size:
            raise CheckpointError(
                f"write of {len(view)} bytes at {offset} does not fit {name}", why=f"{size} bytes"
            )
        with disk_errors(f"cannot write {self._temporary / name}"):
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written

    def commit(self) -> None:
        with disk_errors(f"cannot commit {self.path}"):
            for descriptor, _ in self._files.values():
                os.fsync(descriptor)
            self._close()
            publish(self._temporary, self.path)
        self._committed = True

    def abort(self) -> None:
        self._close()
        if not self._committed:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self) -> None:
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()


class FileSource:
    """Files of a folder, opened when first read; a single file counts as its own folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, int] = {}

    def size(self, name: str) -> int:
        with disk_errors(f"cannot read {self.path / name}"):
            return os.fstat(self._descriptor(name)).st_size

    def read_into(self, name: str, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        with disk_errors(f"cannot read {self.path / name}"):
            descriptor = self._descriptor(name)
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path / name} is truncated", why=f"it ends at byte {offset}"
                    )
                view, offset = view[count:], offset + count

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            path = self.path if self.path.is_file() else self.path / plain_name(name)
            self._files[name] = os.open(path, os.O_RDONLY)
        return self._files[name]


FILES = Storage(
    name="files",
    summary="Buffered files, synced and renamed into place.",
    sink=FileSink,
    source=FileSource,
    preference=0,
)


def publish(temporary: Path, final: Path) -> None:
    """Sync a finished folder, rename it to its final path and sync the parent.

    Raises:
        CheckpointError: when something is at ``final`` already.
    """
    if final.exists():
        raise CheckpointError(f"{final} exists already", fix="choose another path or remove it")
    sync_folder(temporary)
    temporary.rename(final)
    sync_folder(final.parent)


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path, content: bytes) -> None:
    """Write a small file and make its bytes durable."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
