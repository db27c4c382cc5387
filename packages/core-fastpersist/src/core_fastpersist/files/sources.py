"""Tensors as sources of a file's bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from core_fastpersist.direct.pieces import HostBytes, Piece, Source
from core_fastpersist.files.layout import Run
from core_fastpersist.files.views import as_bytes, bits


class RunBytes(HostBytes):
    """Neighbours in host memory, as one stretch of bytes; keeps the tensors alive.

    Args:
        tensors: contiguous, in the order of their addresses, without a gap.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        memory = (ctypes.c_ubyte * size).from_address(tensors[0].data_ptr())
        super().__init__(memoryview(memory))


class LateBytes:
    """The bytes of a tensor on a device, or with elements that do not lie row by row.

    They are put in order when the first of them is asked for, and let go after the last: a file of
    many such tensors takes the memory of few.

    Args:
        tensor: any tensor with memory.
    """

    view: memoryview | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.nbytes: int = tensor.numel() * tensor.itemsize
        self._tensor = tensor
        self._lock = Lock()
        self._ordered: Tensor | None = None
        self._given = 0

    def copy(self, begin: int, end: int, into: memoryview) -> None:
        """Copy bytes ``begin`` to ``end`` into ``into``, which has just that size."""
        if begin == end:
            return
        with self._lock:
            if self._ordered is None:
                self._ordered = row_major_bytes(self._tensor)
            ordered = self._ordered
            self._given += end - begin
            if self._given >= self.nbytes:
                self._ordered, self._given = None, 0
        if ordered.device.type == "cpu":
            # A copy by torch wakes its pool of threads for every piece.
            np.copyto(np.frombuffer(into, dtype=np.uint8), ordered.numpy()[begin:end])
        else:
            torch.frombuffer(into, dtype=torch.uint8).copy_(ordered[begin:end])


def row_major_bytes(tensor: Tensor) -> Tensor:
    """Bytes of a tensor's elements in row-major order; a copy where they do not lie so.

    Returns:
        uint8 of shape (nbytes,), on the tensor's device.
    """
    return as_bytes(bits(tensor).contiguous())


def pieces_of(runs: Sequence[Run], start: int) -> Iterator[Piece]:
    """The pieces of a file's data.

    Args:
        runs: in the order of the file.
        start: first byte of the first.
    """
    for run in runs:
        source: Source
        if run.address is None:
            (part,) = run.parts
            source = LateBytes(part.data)
        else:
            source = RunBytes([part.data for part in run.parts])
        if source.nbytes:
            yield Piece(start, source)
        start += run.nbytes


def storage_bytes(storage: torch.UntypedStorage) -> Source:
    """All bytes of a storage."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    flat.set_(storage)
    return RunBytes([flat]) if storage.device.type == "cpu" else LateBytes(flat)
