"""Chunks in files that have no name: the kernel writes them to the disk when memory gets short."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.errors import CoreError
from core.system import call
from core_fpdt.store.books import Books
from core_fpdt.store.contract import Lane
from core_fpdt.store.counters import Counters
from core_fpdt.store.whole import WholeLane

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PUNCH_HOLE_KEEP_SIZE = 3


class FileStore:
    """For CPUs: lanes are files mapped into memory, and what is got are views of them.

    Pages belong to the file, not to the process: under pressure the kernel writes them out instead
    of ending the process. Nothing has to be tidied up, as the files have no name.

    Args:
        folder: where the files are; the system's temporary folder if empty. On a disk: in a folder
            that lies in memory nothing would be gained.

    Raises:
        CoreError: for a folder that cannot be written to.
    """

    def __init__(self, folder: str = "") -> None:
        self.device = torch.device("cpu")
        self.counters = Counters()
        self._folder = usable_folder(folder)
        self._lanes: weakref.WeakSet[WholeLane] = weakref.WeakSet()

    @property
    def offloads(self) -> bool:
        return True

    def lane(
        self,
        name: str,
        edges: Sequence[int],
        *,
        dim: int,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> Lane:
        # In one piece in any case: a file can give back the pages of single chunks.
        lane = WholeLane(Books(name, edges, dim, dtype), self._room)
        self._lanes.add(lane)
        return lane

    def used(self) -> int:
        return self.counters.used

    def close(self) -> None:
        for lane in list(self._lanes):
            lane.close()

    def _room(self, nbytes: int) -> MappedFile:
        return MappedFile(nbytes, self._folder, self.counters.take)


class MappedFile:
    """A file without a name, mapped into memory as one tensor.

    Its blocks are reserved at once: a full disk is an error here, and no signal later that ends the
    process.

    Args:
        nbytes: its size.
        folder: where it is.
        count: gets the bytes that it takes, and the same negative when it is gone.

    Raises:
        CoreError: when the disk has no room.
    """

    def __init__(
        self, nbytes: int, folder: Path, count: Callable[[int], None] | None = None
    ) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._folder = folder
        self.reserve(0, nbytes)
        path = f"/proc/self/fd/{self._file.fileno()}"
        size = max(nbytes, 1)
        self.data: Tensor = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        if count is not None:
            count(nbytes)
            weakref.finalize(self, count, -nbytes)

    def reserve(self, begin: int, end: int) -> None:
        if end == begin:
            return
        try:
            os.posix_fallocate(self._file.fileno(), begin, end - begin)
        except OSError as error:
            free = free_space(self._folder)
            raise CoreError(
                f"{self._folder} has no room for {end - begin:,} more bytes of chunks",
                why=f"{error.strerror}; {free:,} bytes are free",
                fix="free some, or name another folder as fpdt.folder",
            ) from error

    def forget(self, begin: int, end: int) -> None:
        first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if first < last:
            # Where the file system cannot do this, the blocks go back with the file.
            place = ctypes.c_int64(first), ctypes.c_int64(last - first)
            call("fallocate64", self._file.fileno(), _PUNCH_HOLE_KEEP_SIZE, *place)

    def soon(self, begin: int, end: int) -> None:
        os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file; its blocks go back with the last tensor that shows them."""
        self._file.close()


def usable_folder(folder: str) -> Path:
    """The folder for chunks, or the system's temporary one.

    Raises:
        CoreError: for one that is none, or where no file can be made.
    """
    path = Path(folder or tempfile.gettempdir()).expanduser()
    try:
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise CoreError(
            f"no chunks can be kept in {path}",
            why=error.strerror or str(error),
            fix="name a folder that can be written to as fpdt.folder",
        ) from error


def free_space(folder: Path) -> int:
    """Bytes that this user can still write below a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
