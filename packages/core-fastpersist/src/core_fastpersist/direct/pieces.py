"""What a file is made of: byte ranges, and where their bytes come from."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from core_fastpersist.direct.memory import address

_LARGE = 64 * 2**10


class Source(Protocol):
    """Bytes that go into a file.

    Attributes:
        nbytes: how many.
        view: the bytes where they lie in this machine's memory; ``None`` for those of a device.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def view(self) -> memoryview | None: ...

    def copy(self, begin: int, end: int, into: memoryview) -> None:
        """Copy bytes ``begin`` to ``end`` into ``into``, which has just that size."""


class HostBytes:
    """Bytes in this machine's memory, which are not copied.

    Args:
        data: any contiguous buffer; it must stay as it is until the file is written.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.view: memoryview = memoryview(data).cast("B")
        self.nbytes: int = self.view.nbytes

    @cached_property
    def address(self) -> int:
        """Address of the first byte."""
        return address(self.view)

    def copy(self, begin: int, end: int, into: memoryview) -> None:
        if end - begin < _LARGE:
            into[:] = self.view[begin:end]
        else:
            # Unlike an assignment this lets other threads run, and they have blocks to write.
            ctypes.memmove(address(into), self.address + begin, end - begin)


@dataclass(frozen=True)
class Piece:
    """Bytes and their place in a file.

    Args:
        offset: first byte in the file.
        source: where the bytes are.
    """

    offset: int
    source: Source

    @property
    def end(self) -> int:
        """First byte of the file after this piece."""
        return self.offset + self.source.nbytes

    @cached_property
    def shift(self) -> int | None:
        """Memory address minus file offset; ``None`` where there is no address.

        Direct I/O can go straight from memory where this is a multiple of the alignment.
        """
        if isinstance(self.source, HostBytes):
            return self.source.address - self.offset
        view = self.source.view
        return None if view is None else address(view) - self.offset


class Pieces:
    """The pieces of one file, to be asked for the bytes of any range.

    Args:
        pieces: sorted, without overlap; what lies between them is zero.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = [piece for piece in pieces if piece.source.nbytes]
        self._ends = [piece.end for piece in self._pieces]
        for piece, end in zip(self._pieces, [0, *self._ends], strict=False):
            if piece.offset < end:
                raise ValueError(f"a piece at {piece.offset} overlaps one that ends at {end}")
        self.end = self._ends[-1] if self._ends else 0

    def within(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces with bytes in a range, in order."""
        for index in range(bisect_right(self._ends, begin), len(self._pieces)):
            if self._pieces[index].offset >= end:
                return
            yield self._pieces[index]

    def gather(self, begin: int, end: int, into: memoryview) -> None:
        """Copy the bytes of a range of the file, zeros where no piece is."""
        position = begin
        for piece in self.within(begin, end):
            first, last = max(begin, piece.offset), min(end, piece.end)
            if first > position:
                _zero(into[position - begin : first - begin])
            target = into[first - begin : last - begin]
            piece.source.copy(first - piece.offset, last - piece.offset, target)
            position = last
        if position < end:
            _zero(into[position - begin :])


_ZEROS = bytes(64 * 2**10)


def _zero(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
