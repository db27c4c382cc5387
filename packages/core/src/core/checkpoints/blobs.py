"""Finding a tensor's elements inside a blob that ``torch.save`` wrote, without running its pickle.

DCP stores every tensor as a small ``torch.save`` archive. The elements lie in it uncompressed, so
they can be read straight to where they belong.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import torch

from core.checkpoints.boxes import StoredTensor
from core.errors import CheckpointError
from core.storage import ByteSource


def locate(blob: Slice) -> StoredTensor | None:
    """Find the elements of the one tensor in ``blob``.

    Returns:
        where they lie in the blob's file, or ``None`` when they are not in row-major order or the
        tensor is of an unusual kind, which ``torch.load`` must read.

    Raises:
        CheckpointError: when it is no archive of one tensor.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(blob)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            tensor = _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
            entry = archive.getinfo(names[f"data/{tensor.key}"])
        header = bytearray(30)
        blob.read_at(entry.header_offset, header)
        start = entry.header_offset + len(header) + sum(struct.unpack_from("<HH", header, 26))
    except pickle.UnpicklingError:
        return None
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged archive makes of the parsers
        raise CheckpointError(f"{blob.name} is damaged", why=str(error)) from None
    if not tensor.contiguous or entry.compress_type != zipfile.ZIP_STORED:
        return None
    first = start + tensor.storage_offset * tensor.dtype.itemsize
    end = first + math.prod(tensor.shape) * tensor.dtype.itemsize
    if not start <= first <= end <= start + entry.file_size <= blob.length:
        raise CheckpointError(f"{blob.name} is damaged", why="a tensor lies outside of its archive")
    return StoredTensor(blob.name, blob.offset + first, tensor.dtype, tensor.shape)


class _Described(NamedTuple):
    key: str
    dtype: torch.dtype
    storage_offset: int
    shape: tuple[int, ...]
    contiguous: bool


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
"""Dtypes by the names of the storages in which ``torch.save`` keeps them."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads how a plain tensor lies in its storage, and allows nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_v2
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_v3
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return dtype, str(key)


def _rebuild_v2(
    storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *_: Any
) -> _Described:
    dtype, key = storage
    return _describe(key, dtype, offset, shape, stride)


def _rebuild_v3(
    storage: tuple[torch.dtype, str],
    offset: int,
    shape: Any,
    stride: Any,
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> _Described:
    return _describe(storage[1], dtype, offset, shape, stride)


def _describe(key: str, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> _Described:
    contiguous = torch.empty_strided(shape, stride, dtype=dtype, device="meta").is_contiguous()
    return _Described(key, dtype, offset, tuple(shape), contiguous)


class Slice(io.RawIOBase):
    """A seekable, read-only view of a byte range of a file in a source."""

    def __init__(self, source: ByteSource, name: str, offset: int, length: int) -> None:
        self._source, self.name, self.offset, self.length = source, name, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self._position))
        self._source.read_into(self.name, self.offset + self._position, view[:count])
        self._position += count
        return count

    def read_at(self, offset: int, buffer: bytearray) -> None:
        """Fill ``buffer`` from ``offset`` of the slice on."""
        self._source.read_into(self.name, self.offset + offset, buffer)
