"""The small archive that stock DCP readers expect around every tensor, without its elements.

Stock DCP reads each tensor as an archive of ``torch.save``. All of it but the elements is made here by
torch itself, so that the elements can go to the disk from where they lie. The archive's checksum of the
elements stays zero: ``torch.load`` does not look at it, and the digests beside the file are stronger.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import IO, Any, NamedTuple, cast

import torch
from torch.serialization import skip_data


class Frame(NamedTuple):
    """What stands before and after the elements of a tensor.

    Args:
        before: bytes before the first element.
        after: bytes after the last one.
    """

    before: bytes
    after: bytes


@lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """The archive around a contiguous tensor.

    Args:
        dtype: of the elements.
        shape: of the tensor; memory for it is reserved for a moment, and not touched.
    """
    recorder = _Recorder()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], recorder))
    if recorder.gap is None:  # a tensor without elements
        return Frame(recorder.getvalue(), b"")
    whole = recorder.getvalue()
    return Frame(whole[: recorder.gap], whole[recorder.gap :])


class _Recorder(io.RawIOBase):
    """A file that keeps what is written to it, and where the skipped elements would be."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._skipped = 0
        self.gap: int | None = None

    def getvalue(self) -> bytes:
        return bytes(self._parts)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return len(self._parts) + self._skipped

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._parts += view
        return view.nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR or self.gap is not None:
            raise io.UnsupportedOperation("torch.save skips the elements of one tensor only")
        self.gap = len(self._parts)
        self._skipped = offset
        return self.tell()
