"""Boxes of an index space as tables: intersections, flat ranges, and the proof that they tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Boxes:
    """``n`` boxes of a ``d``-dimensional index space.

    Attributes:
        start: first index of each, shape ``(n, d)``.
        size: extent of each, shape ``(n, d)``.
    """

    start: Table
    size: Table

    def __len__(self) -> int:
        return len(self.start)

    @property
    def volume(self) -> Table:
        """Number of elements of each, shape ``(n,)``."""
        volume: Table = np.prod(self.size, axis=1, dtype=np.int64)
        return volume

    @property
    def end(self) -> Table:
        """First index behind each, shape ``(n, d)``."""
        return self.start + self.size

    def take(self, rows: Table | NDArray[np.bool_]) -> Boxes:
        """The boxes of some rows."""
        return Boxes(self.start[rows], self.size[rows])

    @classmethod
    def of(cls, boxes: Iterable[tuple[Sequence[int], Sequence[int]]], dims: int) -> Boxes:
        """Boxes from (start, size) pairs."""
        rows = list(boxes)
        start = np.array([row[0] for row in rows], np.int64).reshape(len(rows), dims)
        size = np.array([row[1] for row in rows], np.int64).reshape(len(rows), dims)
        return cls(start, size)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Boxes:
        """One box that covers everything."""
        return cls.of([([0] * len(shape), shape)], len(shape))


def join(parts: Sequence[Boxes]) -> Boxes:
    """The boxes of several tables in one."""
    return Boxes(np.concatenate([p.start for p in parts]), np.concatenate([p.size for p in parts]))


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Boxes:
    """The boxes of a range of a row-major tensor's elements, in the order of the elements.

    A range of an N-dimensional tensor makes at most ``2 (N - 1) + 1`` boxes.

    Args:
        shape: of the tensor.
        begin: first element.
        end: element behind the last.
    """
    return flat_ranges(shape, np.array([begin], np.int64), np.array([end], np.int64))[1]


def flat_ranges(shape: Sequence[int], begin: Table, end: Table) -> tuple[Table, Boxes]:
    """The boxes of many ranges of a row-major tensor's elements, see :func:`flat_boxes`.

    Args:
        shape: of the tensor.
        begin: first element of each range, shape ``(n,)``.
        end: element behind the last of each, shape ``(n,)``.

    Returns:
        the range that each box is of, and the boxes in the order of ranges and elements.
    """
    dims = len(shape)
    steps = [math.prod(shape[dim + 1 :]) for dim in range(dims)]
    if not dims or math.prod(shape) == 0:
        row = np.flatnonzero(end > begin) if not dims else np.zeros(0, np.int64)
        return row, Boxes(np.zeros((len(row), dims), np.int64), np.ones((len(row), dims), np.int64))
    # A range climbs to ever larger units until its end is nearer than the next one, and descends.
    place, stops, levels = begin, [begin], [*range(dims - 1, 0, -1), *range(dims)]
    for step, level in enumerate(levels):
        stop = end // steps[level] * steps[level]
        if step < dims - 1:
            stop = np.minimum(stop, -(-place // steps[level - 1]) * steps[level - 1])
        place = np.maximum(place, stop)
        stops.append(place)
    firsts, lasts = np.stack(stops[:-1], axis=1), np.stack(stops[1:], axis=1)
    row, place = np.nonzero(lasts > firsts)
    first, count, level = firsts[row, place], (lasts - firsts)[row, place], np.array(levels)[place]
    start = np.stack(np.unravel_index(first, shape), axis=1).astype(np.int64, copy=False)
    column = np.arange(dims)[None, :]
    size = np.where(column > level[:, None], np.array(shape, np.int64), 1)
    size[np.arange(len(row)), level] = count // np.array(steps, np.int64)[level]
    return row, Boxes(start, size)


def overlaps(left: Boxes, right: Boxes) -> tuple[Table, Table, Boxes]:
    """All intersections of boxes of one table with boxes of another that are not empty.

    Returns:
        rows of the left, rows of the right, and the common boxes; sorted by the right row.
    """
    a, b = _candidates(left, right)
    start = np.maximum(left.start[a], right.start[b])
    size = np.minimum(left.end[a], right.end[b]) - start
    kept = (size > 0).all(axis=1)
    return a[kept], b[kept], Boxes(start[kept], size[kept])


_DENSE = 4096
"""Pairs that are compared without looking for a better way."""


def _candidates(left: Boxes, right: Boxes) -> tuple[Table, Table]:
    """Pairs of rows that overlap in the dimension that tells most of them apart."""
    n, m = len(left), len(right)
    dims = left.start.shape[1]
    if n * m <= _DENSE or dims == 0:
        b, a = np.divmod(np.arange(n * m, dtype=np.int64), max(1, n))
        return a, b
    dim = max(range(dims), key=lambda d: len(np.unique(left.start[:, d])))
    order = np.argsort(left.start[:, dim], kind="stable")
    starts = left.start[order, dim]
    furthest = np.maximum.accumulate(left.end[order, dim])
    low = np.searchsorted(furthest, right.start[:, dim], side="right")
    high = np.searchsorted(starts, right.end[:, dim], side="left")
    counts = np.maximum(high - low, 0)
    b = np.repeat(np.arange(m, dtype=np.int64), counts)
    within = np.arange(int(counts.sum()), dtype=np.int64)
    within -= np.repeat(np.cumsum(counts) - counts, counts)
    return order[low[b] + within].astype(np.int64), b


def untiled(shape: Sequence[int], boxes: Boxes) -> str:
    """Why boxes do not cover a tensor exactly once, or an empty string.

    Args:
        shape: of the tensor.
        boxes: that should tile it.

    Returns:
        the first hole or overlap in words.
    """
    bounds = np.array(shape, np.int64)
    outside = ((boxes.start < 0) | (boxes.end > bounds)).any(axis=1)
    if outside.any():
        return f"{_words(boxes, int(outside.argmax()))} lies outside of {list(shape)}"
    filled = boxes.take(boxes.volume > 0)
    a, b, common = overlaps(filled, filled)
    twice = a != b
    if twice.any():
        return f"{_words(common, int(twice.argmax()))} is there twice"
    missing = math.prod(shape) - int(filled.volume.sum())
    if missing:
        return f"{missing:,} of {math.prod(shape):,} elements are missing{_hole(shape, filled)}"
    return ""


def _hole(shape: Sequence[int], boxes: Boxes) -> str:
    """A first box that is missing, along the first dimension."""
    if not shape:
        return ""
    row = math.prod(shape[1:])
    covered = np.zeros(shape[0] + 1, np.int64)
    width = np.prod(boxes.size[:, 1:], axis=1, dtype=np.int64)
    np.add.at(covered, boxes.start[:, 0], width)
    np.add.at(covered, boxes.end[:, 0], -width)
    short = np.flatnonzero(np.cumsum(covered)[:-1] < row)
    if not len(short):
        return ""
    jumps = np.flatnonzero(np.diff(short) > 1)
    last = short[jumps[0]] if len(jumps) else short[-1]
    return f", the first in rows {short[0]} to {last}"


def _words(boxes: Boxes, row: int) -> str:
    ranges = zip(boxes.start[row], boxes.end[row], strict=True)
    return f"[{', '.join(f'{a}:{b}' for a, b in ranges)}]"
