"""What DCP writes: its metadata, and where the elements of every stored chunk lie.

DCP stores each chunk as a little ``torch.save`` archive. Only the head of an archive is read: the
bytes before the elements depend on nothing but dtype, shape and strides, so what one archive says
holds for every other that starts with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from core.disk import plain_name
from core.errors import CheckpointError
from core_ucp.files.archives import Archive
from core_ucp.files.metadata import METADATA, read_metadata
from core_ucp.files.pickles import Located
from core_ucp.files.trees import atoms_of, walk
from core_ucp.view.boxes import Boxes
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces, row_major
from core_ucp.view.view import Atom

_LONGEST_HEAD = 4096
"""Bytes before the elements up to which the heads of archives are compared."""
_AFTER = (b"PK\x07\x08", b"PK\x03\x04", b"PK\x01\x02")
"""What follows the bytes of an entry in an archive: its checksum, another entry, the directory."""
_LONGEST_PLAIN = 1 << 16
"""Bytes of a pickled value up to which values with the same bytes are read once."""


class Blob(NamedTuple):
    """A byte range of a file.

    Attributes:
        file: index in the table of files.
        offset: first byte.
        length: bytes.
    """

    file: int
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Stored:
    """Everything in a DCP folder.

    Attributes:
        files: the ``.distcp`` files.
        tensors: by key; their pieces may leave holes, see :meth:`core_ucp.view.view.View.prove`.
        objects: pickled values by key.
        paths: where a key stood in the nested state that was saved, where that is known.
        metadata: what DCP itself knows.
    """

    files: Files
    tensors: Mapping[str, Atom]
    objects: Mapping[str, Blob]
    paths: Mapping[str, tuple[str | int, ...]]
    metadata: Metadata


def read_stored(folder: Path, table: Files | None = None) -> Stored:
    """Read the metadata of a DCP folder and find the elements of all chunks.

    Args:
        folder: with ``.metadata``.
        table: that the files become part of, of a folder above; a new one unless given.

    Raises:
        CheckpointError: for metadata that is damaged or wants to run code, and for a chunk that is
            not in the files or is no plain tensor, naming it.
    """
    metadata = read_metadata(folder)
    try:
        return _stored(folder, metadata, Files(folder) if table is None else table)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        # The classes of metadata are known, what their fields hold is anything.
        raise CheckpointError(f"{folder / METADATA} is damaged", why=str(error)) from None


def _stored(folder: Path, metadata: Metadata, files: Files) -> Stored:
    blobs = _blobs(folder, metadata, files)
    locator = _Locator(files)
    tensors: dict[str, Atom] = {}
    objects: dict[str, Blob] = {}
    for key, entry in metadata.state_dict_metadata.items():
        stored = blobs.get(key, {})
        if isinstance(entry, TensorStorageMetadata):
            tensors[key] = _atom(folder, key, entry, stored, locator)
        elif None in stored:
            objects[key] = stored[None]
        else:
            raise CheckpointError(f"{folder} does not hold {key}", why="no file has its bytes")
    return Stored(files, tensors, objects, _paths(metadata), metadata)


def _paths(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    found: Any = metadata.planner_data
    if not isinstance(found, Mapping):
        return {}
    return {
        str(key): tuple(part if isinstance(part, int) else str(part) for part in path)
        for key, path in found.items()
        if isinstance(path, tuple)
    }


def _blobs(
    folder: Path, metadata: Metadata, files: Files
) -> dict[str, dict[tuple[int, ...] | None, Blob]]:
    """Byte ranges of the entries of every key, by the first index of the chunk."""
    found: dict[str, dict[tuple[int, ...] | None, Blob]] = {}
    data: Any = metadata.storage_data
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{folder / METADATA} is damaged", why="it names no files")
    known: dict[str, tuple[int, int]] = {}
    inside = folder.relative_to(files.folder)
    for index, info in data.items():
        name = info.relative_path
        if name not in known:
            file = files.add((inside / plain_name(name)).as_posix())
            known[name] = file, files.size(file)
        file, size = known[name]
        end = info.offset + info.length
        if min(info.offset, info.length) < 0 or end > size:
            raise CheckpointError(
                f"{folder / name} is truncated",
                why=f"{index.fqn} ends at byte {end:,} of {size:,}",
            )
        if info.transform_descriptors:
            packed = ", ".join(info.transform_descriptors)
            raise CheckpointError(f"{folder / name} is packed with {packed}")
        start = None if index.offset is None else tuple(index.offset)
        found.setdefault(index.fqn, {})[start] = Blob(file, info.offset, info.length)
    return found


def _atom(
    folder: Path,
    key: str,
    entry: TensorStorageMetadata,
    stored: Mapping[tuple[int, ...] | None, Blob],
    locator: _Locator,
) -> Atom:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    boxes, file, offset, stride = [], [], [], []
    for chunk in entry.chunks:
        start, size = tuple(chunk.offsets), tuple(chunk.sizes)
        if 0 in size:
            continue
        blob = stored.get(start)
        if blob is None:
            words = ", ".join(f"{a}:{a + n}" for a, n in zip(start, size, strict=True))
            raise CheckpointError(
                f"{folder} does not hold [{words}] of {key}",
                why=f"{METADATA} names no file for it",
            )
        at, strides = locator.find(key, blob, dtype, size)
        boxes.append((start, size))
        file.append(blob.file)
        offset.append(at)
        stride.append(strides)
    pieces = Pieces(
        Boxes.of(boxes, len(shape)),
        np.array(file, np.int64),
        np.array(offset, np.int64),
        np.array(stride, np.int64).reshape(len(boxes), len(shape)),
    )
    return Atom(shape, dtype, pieces)


_Kind = tuple[torch.dtype, tuple[int, ...]]


class _Locator:
    """Finds the elements of chunks, with a look at the head of each archive."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._heads: dict[_Kind, bytes] = {}

    def find(
        self, key: str, blob: Blob, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[int, list[int]]:
        """First byte of a chunk's elements in its file, and its byte strides.

        Raises:
            CheckpointError: when the archive is damaged, or holds another tensor.
        """
        stride, nbytes = row_major(shape, dtype.itemsize), math.prod(shape) * dtype.itemsize
        head = self._heads.get((dtype, shape))
        if head is not None and self._starts_with(head, blob, nbytes):
            return blob.offset + len(head), stride
        found = Archive(_Window(self._files, blob), 0).read()
        if not isinstance(found, Located) or (found.dtype, found.shape) != (dtype, shape):
            raise self._damaged(blob, f"it holds no {dtype} of {list(shape)} where {key} should be")
        end = found.storage.offset + found.storage.nbytes
        if self._bytes(blob, end, 4) not in _AFTER:
            raise self._damaged(blob, f"the elements of {key} do not end where they should")
        if not found.contiguous:
            return blob.offset + found.offset, [step * dtype.itemsize for step in found.stride]
        if found.offset <= _LONGEST_HEAD:
            self._heads[dtype, shape] = self._bytes(blob, 0, found.offset)
        return blob.offset + found.offset, stride

    def _starts_with(self, head: bytes, blob: Blob, nbytes: int) -> bool:
        fits = len(head) + nbytes <= blob.length
        return fits and self._bytes(blob, 0, len(head)) == head

    def _bytes(self, blob: Blob, offset: int, count: int) -> bytes:
        buffer = bytearray(min(count, blob.length - offset))
        self._files.read_into(blob.file, blob.offset + offset, memoryview(buffer))
        return bytes(buffer)

    def _damaged(self, blob: Blob, why: str) -> CheckpointError:
        return CheckpointError(f"{self._files.path(blob.file)} is damaged", why=why)


class _Window(Files):
    """One blob as a table of one file."""

    def __init__(self, files: Files, blob: Blob) -> None:
        super().__init__(files.folder)
        self._inner, self._blob = files, blob

    def path(self, index: int) -> Path:
        return self._inner.path(self._blob.file)

    def size(self, index: int) -> int:
        return self._blob.length

    def read_into(self, index: int, offset: int, buffer: memoryview) -> None:
        if offset + buffer.nbytes > self._blob.length:
            raise CheckpointError(f"{self.path(index)} is damaged", why="an entry leaves its blob")
        self._inner.read_into(self._blob.file, self._blob.offset + offset, buffer)


class Objects:
    """Reads pickled values; those with the same bytes only once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: dict[bytes, Any] = {}

    def read(self, key: str, blob: Blob) -> Any:
        """A value made of plain values and tensors, which come out as atoms.

        Raises:
            CheckpointError: when it is anything else, or damaged; nothing of it was run then.
        """
        if blob.length > _LONGEST_PLAIN:
            return self._parsed(blob)
        buffer = bytearray(blob.length)
        self._files.read_into(blob.file, blob.offset, memoryview(buffer))
        content = bytes(buffer)
        if content not in self._known:
            value = self._parsed(blob)
            if any(isinstance(leaf, Atom) for _, leaf in walk(value)):
                return value
            self._known[content] = value
        return self._known[content]

    def _parsed(self, blob: Blob) -> Any:
        value = Archive(_Window(self._files, blob), 0).read()
        return atoms_of(value, blob.file, blob.offset)
