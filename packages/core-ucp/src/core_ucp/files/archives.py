"""Files of ``torch.save``: zip archives with one pickle, and one uncompressed entry per storage.

Only the directory of the archive and the pickle are read. Tensors come out as references to the
bytes of their storages, so a file of any size is opened in milliseconds.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from core_ucp.files.pickles import Storage, unpickle
from core_ucp.view.files import Files

_HEADER = 30
"""Bytes of a local header before the name."""
_USUAL_HEADER = 256
"""Bytes that are read of a header at first, with its name and what pads it."""
_MAGIC = b"PK\x03\x04"
_MAPPINGS = b"}", b"ccollections\nOrderedDict\n", b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict"
"""How the pickle of a dictionary goes on behind its protocol."""
_LONGEST_PICKLE = 1 << 30


def holds_mapping(path: Path) -> bool:
    """Whether a file is an archive of ``torch.save`` that holds a dictionary, told by its first bytes."""
    try:
        with path.open("rb") as handle:
            head = handle.read(_USUAL_HEADER)
    except OSError:
        return False
    if head[:4] != _MAGIC or len(head) < _HEADER:
        return False
    name, extra = struct.unpack_from("<HH", head, _HEADER - 4)
    first = head[_HEADER : _HEADER + name].endswith(b"/data.pkl")
    pickled = head[_HEADER + name + extra :][2:]
    if pickled[:1] == b"\x95":  # from protocol 4 on, the length of a frame comes first
        pickled = pickled[9:]
    return first and pickled.startswith(_MAPPINGS)


def read_archive(files: Files, name: str | int, allow: Collection[str] = ()) -> Any:
    """What ``torch.load`` would return, with tensors by reference and other objects inert.

    Args:
        files: the table that the file is in, or becomes part of.
        name: of the file, or its index.
        allow: dotted names of classes (``*`` stands for anything) that come out as
            :class:`core_ucp.files.pickles.Inert`.

    Raises:
        CheckpointError: for a file that is damaged, packed, of the format before torch 1.6, or that
            wants to run code, naming it.
    """
    index = files.add(name) if isinstance(name, str) else name
    return Archive(files, index).read(allow)


class Archive:
    """The directory of one archive.

    Args:
        files: the table that the file is in.
        file: its index.

    Raises:
        CheckpointError: when it is no archive, or damaged.
    """

    def __init__(self, files: Files, file: int) -> None:
        self._files, self._file = files, file
        self._path = files.path(file)
        self._storages: dict[str, Storage] = {}
        if files.size(file) < len(_MAGIC) or self._bytes(0, len(_MAGIC)) != _MAGIC:
            raise CheckpointError(
                f"{self._path} is no archive of torch.save",
                why="it does not begin as one; files older than torch 1.6 do not",
                fix="load and save it with a newer torch where it was written",
            )
        try:
            with zipfile.ZipFile(io.BufferedReader(_Reader(files, file))) as archive:
                self._directory(archive)
                self._pickle = self._content(archive, "data.pkl", _LONGEST_PICKLE)
                if "byteorder" in self._entries:
                    self._require_little(self._content(archive, "byteorder", 16))
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged archive makes of the parser
            raise self._damaged(str(error) or type(error).__name__) from None

    def read(self, allow: Collection[str] = ()) -> Any:
        """The pickled tree; see :func:`read_archive`."""
        return unpickle(self._pickle, str(self._path), self._storage, allow)

    def _directory(self, archive: zipfile.ZipFile) -> None:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2] for entry in entries]
        self._entries = dict(zip(names, entries, strict=True))
        if len(self._entries) != len(entries):
            double = next(name for name in names if names.count(name) > 1)
            raise self._damaged(f"it has two entries named {double!r}")
        if "data.pkl" not in self._entries:
            raise self._damaged("it holds no data.pkl")
        ordered = sorted(entries, key=lambda entry: entry.header_offset)
        ends = [entry.header_offset for entry in ordered[1:]] + [archive.start_dir]
        self._ends = {e.header_offset: end for e, end in zip(ordered, ends, strict=True)}
        for entry, following in zip(ordered, ends, strict=True):
            least = entry.header_offset + _HEADER + len(entry.filename.encode())
            if entry.header_offset < 0 or least + entry.compress_size > following:
                raise self._damaged(f"the entry {entry.filename!r} reaches into the next one")

    def _content(self, archive: zipfile.ZipFile, name: str, longest: int) -> bytes:
        entry = self._entries[name]
        self._require_stored(entry)
        if entry.file_size > longest:
            raise self._damaged(f"its {name} has {entry.file_size:,} bytes")
        return archive.read(entry)

    def _storage(self, key: str, dtype: torch.dtype, numel: int) -> Storage:
        if key not in self._storages:
            entry = self._entries.get(f"data/{key}")
            if entry is None:
                raise self._damaged(f"it holds no storage {key!r}")
            self._require_stored(entry)
            # Nothing can be read of an empty one; ZeRO-3 files have thousands.
            offset = self._begin(entry) if entry.file_size else entry.header_offset
            self._storages[key] = Storage(self._file, offset, entry.file_size, dtype)
        found = self._storages[key]
        if numel * dtype.itemsize > found.nbytes:
            raise self._damaged(
                f"the storage {key!r} has {found.nbytes:,} bytes and not {numel * dtype.itemsize:,}"
            )
        return found if found.dtype == dtype else replace(found, dtype=dtype)

    def _begin(self, entry: zipfile.ZipInfo) -> int:
        """First byte of an entry's content.

        The directory does not say it: the header in front of the content has fields of its own,
        which are held to what the directory says, and to their own form.
        """
        at, end = entry.header_offset, self._ends[entry.header_offset]
        header = self._bytes(at, min(end - at, _USUAL_HEADER))
        name, extra = struct.unpack_from("<HH", header, 26)
        length = _HEADER + int(name) + int(extra)
        if length > len(header):
            header = self._bytes(at, min(end - at, length))
        begin, split = at + length, _HEADER + int(name)
        sound = header[:4] == _MAGIC and header[_HEADER:split] == entry.orig_filename.encode()
        if not sound or not _well_formed(header[split:length]):
            raise self._damaged(f"the header of {entry.filename!r} is not what the directory says")
        if begin + entry.file_size > end:
            raise self._damaged(f"the entry {entry.filename!r} reaches into the next one")
        return begin

    def _bytes(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._files.read_into(self._file, offset, memoryview(buffer))
        return bytes(buffer)

    def _require_stored(self, entry: zipfile.ZipInfo) -> None:
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not plain or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{self._path} is packed",
                why=f"the entry {entry.filename!r} is compressed or encrypted",
                fix="load it with torch, and save it again",
            )

    def _require_little(self, order: bytes) -> None:
        if order.strip() != b"little":
            raise CheckpointError(
                f"{self._path} holds numbers in the byte order {order[:16]!r}",
                fix="load it with torch on a little-endian machine, and save it again",
            )

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged", why=why)


def _well_formed(extra: bytes) -> bool:
    """Whether the extra fields of a header follow each other without a gap."""
    position = 0
    while position + 4 <= len(extra):
        position += 4 + int(struct.unpack_from("<H", extra, position + 2)[0])
    return position == len(extra)


class _Reader(io.RawIOBase):
    """A file of a table as a stream."""

    def __init__(self, files: Files, file: int) -> None:
        self._files, self._file, self._position = files, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self._files.size(self._file)
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._files.size(self._file) - self._position))
        self._files.read_into(self._file, self._position, view[:count])
        self._position += count
        return count
