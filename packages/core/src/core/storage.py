"""Byte sinks and sources: how bytes get from memory into a folder and back.

Checkpoint writers and converters are written against these two protocols, so that a faster carrier
(direct I/O, a remote store) serves all of them. The default is buffered files. A sink makes its own
files durable, and every rank has one; that a finished folder appears at once is the work of core,
which hands out a temporary folder and renames it when all ranks are done.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from core.contributions import Storage
from core.disk import TEMPORARY, disk_errors, plain_name, sync
from core.errors import CheckpointError
from core.system import preallocate, start_writing

Buffer = bytes | bytearray | memoryview
_AT_ONCE = 128 * 2**10
"""Bytes of one write. For larger ones the page cache takes large runs of free memory, which in a
virtual machine often have to come from the host first: that costs several times as much."""
_LARGE = 2**20
"""Bytes from which on a write goes to the disk at once, beside whatever the program does next."""


class ByteSink(Protocol):
    """The files that one rank writes into a folder, which other sinks may write into as well.

    Opening a sink creates the folder, unless it is there. Whoever hands out the folder makes it
    visible: see :func:`new_folder`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "out"
        >>> first, second = FileSink(folder), FileSink(folder)
        >>> first.open("data", size=5)
        >>> first.write_at("data", 3, b"lo")
        >>> first.write_at("data", 0, b"hel")
        >>> second.open("more", size=2)
        >>> first.commit()
        >>> second.abort()
        >>> [(path.name, path.read_bytes()) for path in folder.iterdir()]
        [('data', b'hello')]
    """

    def open(self, name: str, size: int) -> None:
        """Create the file ``name`` with ``size`` bytes; what is not written stays zero.

        Raises:
            CheckpointError: when the name is taken or leaves the folder, or the disk refuses.
        """

    def write_at(self, name: str, offset: int, data: Buffer) -> None:
        """Write ``data`` at byte ``offset``; any order, any thread, no overlap.

        Raises:
            CheckpointError: outside of the file's size, or when the disk refuses.
        """

    def commit(self) -> None:
        """Make this sink's files durable, and their names in the folder; returns when they are."""

    def abort(self) -> None:
        """Remove this sink's files and no others; harmless after ``commit()``."""


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
    """Buffered files, synced on commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, tuple[int, int]] = {}
        self._committed = False
        with disk_errors(f"cannot create {path}"):
            path.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size: int) -> None:
        path = self.path / plain_name(name)
        with disk_errors(f"cannot create {path} with {size:,} bytes"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._files[name] = descriptor, size
            if not preallocate(descriptor, size):
                os.truncate(descriptor, size)

    def write_at(self, name: str, offset: int, data: Buffer) -> None:
        if name not in self._files:
            raise CheckpointError(f"{name!r} is not open")
        descriptor, size = self._files[name]
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > size:
            raise CheckpointError(
                f"write of {len(view)} bytes at {offset} does not fit {name}", why=f"{size} bytes"
            )
        begin, length = offset, len(view)
        with disk_errors(f"cannot write {self.path / name}"):
            while view:
                written = os.pwrite(descriptor, view[:_AT_ONCE], offset)
                view, offset = view[written:], offset + written
            if length >= _LARGE:
                start_writing(descriptor, begin, length)

    def commit(self) -> None:
        with disk_errors(f"cannot commit {self.path}"):
            for descriptor, _ in self._files.values():
                os.fsync(descriptor)
            sync(self.path)
        self._committed = True
        self._close()

    def abort(self) -> None:
        for name in () if self._committed else self._files:
            (self.path / name).unlink(missing_ok=True)
        self._close()

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

    def __del__(self) -> None:
        # DCP readers own sources and have no end of their own.
        self.close()

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            path = self.path if self.path.is_file() else self.path / plain_name(name)
            self._files[name] = os.open(path, os.O_RDONLY)
        return self._files[name]


FILES = Storage(
    name="files",
    summary="Buffered files, synced.",
    sink=FileSink,
    source=FileSource,
    preference=0,
)


@contextmanager
def new_folder(final: Path) -> Generator[Path]:
    """Fill a folder that appears at ``final`` when the block ends well, and else leaves nothing.

    Args:
        final: path that must not exist; missing parents are created and stay.

    Yields:
        an empty temporary folder beside ``final``.

    Raises:
        CheckpointError: when something is at ``final``, or the disk refuses.

    Example:
        >>> import tempfile
        >>> final = Path(tempfile.mkdtemp()) / "out"
        >>> with new_folder(final) as folder:
        ...     _ = (folder / "data").write_bytes(b"hello")
        ...     final.exists()
        False
        >>> final.exists()
        True
    """
    require_free(final)
    temporary = final.with_name(f"{final.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(f"cannot create {final}"):
            temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Sync a finished folder with all that is in it, rename it and sync the parent.

    Raises:
        CheckpointError: when something is at ``final`` already, or the disk refuses.
    """
    require_free(final)
    with disk_errors(f"cannot create {final}"):
        for folder, _, names in os.walk(temporary):
            # Files that their writer has synced cost next to nothing here; others need it.
            for path in [*(Path(folder) / name for name in names), Path(folder)]:
                sync(path)
        temporary.rename(final)
        sync(final.parent)


def require_free(path: Path) -> None:
    """Refuse a path that is taken, if only by a link that leads nowhere.

    Raises:
        CheckpointError: when something is at ``path``.
    """
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already", fix="choose another path or remove it")
