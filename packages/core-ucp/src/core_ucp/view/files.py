"""The files that pieces refer to: opened when first read, and held to what they were at first."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.view.pieces import Pieces

_IN_MEMORY = -1
"""In the place of the time at which a file was written, for those that are in memory."""
_MOST_OPEN = 256
"""Files that are open at once: checkpoints have thousands, and processes may often open 1024."""


class _Handle:
    """A file that is open for reading, until nobody refers to it any more.

    A thread may still read from a file that another one has pushed out of the table.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Files:
    """A table of files that are read, from any thread.

    Args:
        folder: that the names are relative to.
        names: of the files, with ``/`` between folders; more can be added.
    """

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._paths: list[Path] = []
        self._index: dict[str, int] = {}
        self._stamps: list[tuple[int, int]] = []
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self._memory: dict[int, bytes] = {}
        self._lock = threading.Lock()
        for name in names:
            self.add(name)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str) -> int:
        """Index of a file, which becomes part of the table.

        Raises:
            CheckpointError: when it leaves the folder or is no file.
        """
        if name in self._index:
            return self._index[name]
        path = self.folder / name
        if name.startswith("/") or ".." in Path(name).parts:
            raise CheckpointError(f"{name!r} leaves {self.folder}")
        with disk_errors(f"cannot read {path}"):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no file")
        self._index[name] = len(self.names)
        self.names.append(name)
        self._paths.append(path)
        self._stamps.append((status.st_size, status.st_mtime_ns))
        return self._index[name]

    def add_bytes(self, name: str, data: bytes) -> int:
        """Index of a file in memory, which becomes part of the table.

        For the few tensors that no file holds as bytes, such as a step that a pickle writes as a
        number. It is read as all others are, so that everything can be copied alike.

        Args:
            name: in messages; is never looked up on the disk.
            data: all bytes of the file.
        """
        index = len(self.names)
        self.names.append(name)
        self._paths.append(self.folder / name)
        self._stamps.append((len(data), _IN_MEMORY))
        self._memory[index] = data
        return index

    def path(self, index: int) -> Path:
        """Path of a file."""
        return self._paths[index]

    def size(self, index: int) -> int:
        """Bytes of a file when it was added."""
        return self._stamps[index][0]

    def read_into(self, index: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of a file on.

        Raises:
            CheckpointError: when the file ends early, or the disk refuses.
        """
        view = buffer.cast("B")
        held = self._memory.get(index)
        if held is not None:
            if offset + len(view) > len(held):
                raise self._truncated(index, len(held))
            view[:] = held[offset : offset + len(view)]
            return
        with disk_errors(f"cannot read {self.path(index)}"):
            handle = self._handle(index)
            while view:
                count = os.preadv(handle.descriptor, [view], offset)
                if count == 0:
                    raise self._truncated(index, offset)
                view, offset = view[count:], offset + count

    def _handle(self, index: int) -> _Handle:
        """The open file, which is the last one to be closed."""
        with self._lock:
            handle = self._open.get(index) or _Handle(self.path(index))
            self._open[index] = handle
            self._open.move_to_end(index)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            return handle

    def _truncated(self, index: int, end: int) -> CheckpointError:
        return CheckpointError(f"{self.path(index)} is truncated", why=f"it ends at byte {end:,}")

    def require(self, what: str, pieces: Pieces, itemsize: int) -> None:
        """Make sure that pieces lie inside of their files.

        Raises:
            CheckpointError: naming ``what``, the file and the byte.
        """
        filled = pieces.filled
        if not len(filled):
            return
        if (filled.stride < 0).any():
            raise CheckpointError(f"{what} lies backwards in {self.folder}")
        reach = ((filled.boxes.size - 1) * filled.stride).sum(axis=1) + itemsize
        sizes = np.array([size for size, _ in self._stamps], np.int64)
        bad = (filled.offset < 0) | (filled.offset + reach > sizes[filled.file])
        if bad.any():
            row = int(bad.argmax())
            raise CheckpointError(
                f"{self.path(int(filled.file[row]))} is truncated",
                why=f"{what} ends at byte {int(filled.offset[row] + reach[row]):,} of"
                f" {int(sizes[filled.file[row]]):,}",
            )

    def require_unchanged(self) -> None:
        """Make sure that no file was written since it was added.

        Raises:
            CheckpointError: naming the file.
        """
        for index, stamp in enumerate(self._stamps):
            if stamp[1] == _IN_MEMORY:
                continue
            with disk_errors(f"cannot read {self.path(index)}"):
                status = self.path(index).stat()
            if (status.st_size, status.st_mtime_ns) != stamp:
                raise CheckpointError(
                    f"{self.path(index)} was changed while it was read",
                    fix="wait until the checkpoint is complete, and start again",
                )

    def close(self) -> None:
        """Close what is open; what is read later is opened again."""
        with self._lock:
            self._open.clear()
