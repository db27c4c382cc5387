"""Where the elements of an atom lie: boxes of it, each strided in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core_ucp.view import boxes as geometry
from core_ucp.view.boxes import Boxes, Rows, Table


@dataclass(frozen=True, eq=False)
class Pieces:
    """Boxes of an atom and the bytes that hold them.

    Attributes:
        boxes: ``n`` boxes of the atom's index space of ``d`` dimensions.
        file: index of each piece's file in the table of files, shape ``(n,)``.
        offset: byte of the first element of each in its file, shape ``(n,)``.
        stride: bytes from one element to the next in every dimension, shape ``(n, d)``.
    """

    boxes: Boxes
    file: Table
    offset: Table
    stride: Table

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: Rows) -> Pieces:
        """The pieces of some rows."""
        return Pieces(self.boxes.take(rows), self.file[rows], self.offset[rows], self.stride[rows])

    @property
    def filled(self) -> Pieces:
        """The pieces that hold any element."""
        volume = self.boxes.volume
        return self if volume.all() else self.take(volume > 0)

    def cut(self, rows: Table, inner: Boxes) -> Pieces:
        """Parts of pieces.

        Args:
            rows: the piece that each part is cut from, shape ``(m,)``.
            inner: ``m`` boxes of the atom that lie inside of those pieces.
        """
        moved = ((inner.start - self.boxes.start[rows]) * self.stride[rows]).sum(axis=1)
        return Pieces(inner, self.file[rows], self.offset[rows] + moved, self.stride[rows])

    @classmethod
    def dense(
        cls,
        shape: Sequence[int],
        file: int,
        offset: int,
        itemsize: int,
        start: Sequence[int] | None = None,
    ) -> Pieces:
        """One box in row-major order.

        Args:
            shape: of the box.
            file: index of its file.
            offset: byte of its first element.
            itemsize: bytes of an element.
            start: first index of the box in the atom; zeros unless given.
        """
        first = [0] * len(shape) if start is None else start
        boxes = Boxes(np.array([first], np.int64), np.array([shape], np.int64))
        stride = np.array([row_major(shape, itemsize)], np.int64).reshape(1, len(shape))
        return cls(boxes, np.array([file], np.int64), np.array([offset], np.int64), stride)

    @classmethod
    def flat(
        cls, shape: Sequence[int], begin: int, end: int, file: int, offset: int, itemsize: int
    ) -> Pieces:
        """A range of the row-major elements of the whole atom, as ZeRO cuts it.

        Args:
            shape: of the atom.
            begin: first element of the range.
            end: element behind the last.
            file: index of its file.
            offset: byte of the first element of the range.
            itemsize: bytes of an element.
        """
        first, last, files, offsets = np.array([[begin], [end], [file], [offset]], np.int64)
        return cls.ranges(shape, first, last, files, offsets, itemsize)[1]

    @classmethod
    def ranges(
        cls,
        shape: Sequence[int],
        begin: Table,
        end: Table,
        file: Table,
        offset: Table,
        itemsize: int,
    ) -> tuple[Table, Pieces]:
        """Many ranges of the row-major elements of the whole atom, see :meth:`flat`.

        Args:
            shape: of the atom.
            begin: first element of each range, shape ``(n,)``.
            end: element behind the last of each, shape ``(n,)``.
            file: index of each range's file, shape ``(n,)``.
            offset: byte of the first element of each range, shape ``(n,)``.
            itemsize: bytes of an element.

        Returns:
            the range that each piece is of, and the pieces in the order of ranges and elements.
        """
        row, boxes = geometry.flat_ranges(shape, begin, end)
        step = np.array(row_major(shape, itemsize), np.int64).reshape(1, len(shape))
        stride = np.repeat(step, len(boxes), axis=0)
        first = (boxes.start * stride).sum(axis=1) - begin[row] * itemsize
        return row, cls(boxes, file[row], offset[row] + first, stride)


def join(parts: Sequence[Pieces]) -> Pieces:
    """The pieces of several tables in one."""
    return Pieces(
        geometry.join([part.boxes for part in parts]),
        np.concatenate([part.file for part in parts]),
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.stride for part in parts]),
    )


def nowhere(dims: int) -> Pieces:
    """No piece at all, of an atom with that many dimensions."""
    none = np.zeros(0, np.int64)
    return Pieces(Boxes.of([], dims), none, none, np.zeros((0, dims), np.int64))


def row_major(shape: Sequence[int], itemsize: int) -> list[int]:
    """Bytes from one element to the next in every dimension of a row-major tensor."""
    return [itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
