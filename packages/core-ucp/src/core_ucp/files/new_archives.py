"""Files as ``torch.save`` makes them, whose tensors are filled in later.

A zip archive that stores its entries without compression: the pickled tree, and one entry for every
tensor that begins at a multiple of 64 bytes. The checksums of entries that have no bytes yet are
computed by :meth:`Archive.seal`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from core.disk import disk_errors, sync
from core.errors import CheckpointError
from core_ucp.files.new_file import NewFile
from core_ucp.files.new_pickles import Room, pickled

_ALIGNMENT = 64
_BLOCK = 8 << 20
_LIMIT = 0xFFFFFFFF
_COUNT_LIMIT = 0xFFFF
_DATE = 0x21  # the first of January 1980, before which zip files know no time
_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


@dataclass(frozen=True)
class _Entry:
    """An entry of the archive.

    Attributes:
        name: in the archive.
        header: byte of its local header.
        begin: byte of its content.
        size: bytes of its content.
        crc: checksum of its content, 0 until that is known.
    """

    name: bytes
    header: int
    begin: int
    size: int
    crc: int


@dataclass(frozen=True, eq=False)
class Archive:
    """The layout of a file, and where its tensors lie.

    Attributes:
        file: name, size and all bytes but those of the tensors.
        places: byte of the first element of every :class:`Room` of the tree.
        unsealed: (byte of the content, its size, bytes of the two checksums) of entries without
            a checksum.
    """

    file: NewFile
    places: Mapping[Room, int]
    unsealed: tuple[tuple[int, int, tuple[int, int]], ...] = field(repr=False)

    def named(self, name: str) -> Archive:
        """The same file under another name."""
        return replace(self, file=replace(self.file, name=name))

    def seal(self, path: Path) -> None:
        """Compute the checksums of all tensors, when their bytes are there.

        Args:
            path: of the file.

        Raises:
            CheckpointError: when the disk refuses, or the file ends early.
        """
        with disk_errors(f"cannot write {path}"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                for begin, size, checksums in self.unsealed:
                    crc = struct.pack("<I", _checksum(path, descriptor, begin, size))
                    for offset in checksums:
                        os.pwrite(descriptor, crc, offset)
            finally:
                os.close(descriptor)
            sync(path)


def new_archive(name: str, tree: Any) -> Archive:
    """Lay out a file.

    Args:
        name: of the file, with ``/`` between folders.
        tree: what ``torch.load`` returns, with :class:`Room` in the place of tensors that are
            written later.

    Raises:
        CheckpointError: for a value that cannot be pickled, naming its place.
    """
    data, tensors = pickled(tree)
    zipped = _Zip()
    zipped.add("data.pkl", len(data), data)
    zipped.add("byteorder", 6, b"little")
    places: dict[Room, int] = {}
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, Room):
            places[tensor] = zipped.add(f"data/{number}", tensor.nbytes, None)
        else:
            content = _content(tensor)
            zipped.add(f"data/{number}", len(content), content)
    zipped.add("version", 2, b"3\n")
    size, checksums = zipped.close()
    unsealed = tuple(
        (entry.begin, entry.size, checksum)
        for entry, checksum, known in zip(zipped.entries, checksums, zipped.known, strict=True)
        if not known and entry.size
    )
    return Archive(NewFile(name, size, tuple(zipped.parts)), places, unsealed)


def _content(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


class _Zip:
    """A zip file that is laid out from front to back."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.known: list[bool] = []
        self.parts: list[tuple[int, bytes]] = []
        self.position = 0

    def add(self, name: str, size: int, content: bytes | None) -> int:
        """Append an entry, whose content may come later; return the byte of its content."""
        path = f"archive/{name}".encode()
        crc = 0 if content is None else zlib.crc32(content)
        large = size >= _LIMIT
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        begin = self.position + 30 + len(path) + len(extra) + 4
        padding = -begin % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
        shown = _LIMIT if large else size
        header = struct.pack(
            "<4s5H3I2H",
            *(_LOCAL, 45 if large else 20, 0, 0, 0, _DATE, crc, shown, shown),
            *(len(path), len(extra)),
        )
        self._put(header + path + extra + (content or b""))
        self.entries.append(_Entry(path, self.position, begin + padding, size, crc))
        self.known.append(content is not None)
        self.position = begin + padding + size
        return begin + padding

    def close(self) -> tuple[int, list[tuple[int, int]]]:
        """Append the directory; return the size of the file and where checksums stand."""
        begin, checksums, records = self.position, list[tuple[int, int]](), list[bytes]()
        at = begin
        for entry in self.entries:
            checksums.append((entry.header + 14, at + 16))
            records.append(_record(entry))
            at += len(records[-1])
        directory = b"".join(records) + _end(len(records), begin, at - begin)
        self._put(directory)
        return begin + len(directory), checksums

    def _put(self, data: bytes) -> None:
        self.parts.append((self.position, data))


def _record(entry: _Entry) -> bytes:
    """Record of an entry in the directory."""
    extra = b""
    large = entry.size >= _LIMIT
    far = entry.header >= _LIMIT
    if large or far:
        numbers = [entry.size, entry.size] * large + [entry.header] * far
        extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
    size = _LIMIT if large else entry.size
    return (
        struct.pack(
            "<4s6H3I5H2I",
            *(_CENTRAL, 45, 45 if extra else 20, 0, 0, 0, _DATE, entry.crc, size, size),
            *(len(entry.name), len(extra), 0, 0, 0, 0, _LIMIT if far else entry.header),
        )
        + entry.name
        + extra
    )


def _end(count: int, begin: int, size: int) -> bytes:
    """What follows on the directory of ``count`` records from byte ``begin`` on."""
    data = b""
    if count >= _COUNT_LIMIT or begin >= _LIMIT or size >= _LIMIT:
        data = struct.pack("<4sQ2H2I4Q", _END64, 44, 45, 45, 0, 0, count, count, size, begin)
        data += struct.pack("<4sIQI", _LOCATOR, 0, begin + size, 1)
    shown = min(count, _COUNT_LIMIT)
    tail = (min(size, _LIMIT), min(begin, _LIMIT), 0)
    return data + struct.pack("<4s4H2IH", _END, 0, 0, shown, shown, *tail)


def _checksum(path: Path, descriptor: int, begin: int, size: int) -> int:
    crc, end = 0, begin + size
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - begin)]], begin)
        if count == 0:
            raise CheckpointError(f"{path} is truncated", why=f"it ends at byte {begin:,}")
        crc = zlib.crc32(buffer[:count], crc)
        begin += count
    return crc
