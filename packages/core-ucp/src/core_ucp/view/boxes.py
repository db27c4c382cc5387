"""Boxes of an index space as tables: intersections, flat ranges, and the proof that they tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]
Rows = Table | NDArray[np.bool_] | slice


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

    @cached_property
    def volume(self) -> Table:
        """Number of elements of each, shape ``(n,)``."""
        volume: Table = np.prod(self.size, axis=1, dtype=np.int64)
        return volume

    @property
    def end(self) -> Table:
        """First index behind each, shape ``(n, d)``."""
        return self.start + self.size

    def take(self, rows: Rows) -> Boxes:
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
        size = np.array([shape], np.int64)
        return cls(np.zeros_like(size), size)


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
    lefts: list[Table] = []
    rights: list[Table] = []
    found: list[Boxes] = []
    for a, b in _candidates(left, right):
        start = np.maximum(left.start[a], right.start[b])
        size = np.minimum(left.end[a], right.end[b]) - start
        kept = (size > 0).all(axis=1)
        lefts.append(a[kept])
        rights.append(b[kept])
        found.append(Boxes(start[kept], size[kept]))
    if len(found) == 1:
        return lefts[0], rights[0], found[0]
    return np.concatenate(lefts), np.concatenate(rights), join(found)


_DENSE = 4096
"""Pairs that are compared without looking for a better way."""

_AT_ONCE = 2**21
"""Pairs that are in memory at once, about."""


def _candidates(left: Boxes, right: Boxes) -> Iterator[tuple[Table, Table]]:
    """Pairs of rows that overlap in the dimension that tells most of them apart."""
    n, m = len(left), len(right)
    dims = left.start.shape[1]
    if n * m <= _DENSE or dims == 0:
        b, a = np.divmod(np.arange(n * m, dtype=np.int64), max(1, n))
        yield a, b
        return
    # The dimension along which boxes are the shortest, measured by what they span together.
    first = np.minimum(left.start.min(axis=0), right.start.min(axis=0))
    span = np.maximum(left.end.max(axis=0), right.end.max(axis=0)) - first
    mean = left.size.mean(axis=0) + right.size.mean(axis=0)
    dim = int((mean / np.maximum(span, 1)).argmin())
    order = np.argsort(left.start[:, dim], kind="stable")
    starts = left.start[order, dim]
    furthest = np.maximum.accumulate(left.end[order, dim])
    low = np.searchsorted(furthest, right.start[:, dim], side="right")
    high = np.searchsorted(starts, right.end[:, dim], side="left")
    counts = np.maximum(high - low, 0)
    sums = np.cumsum(counts)
    bounds = np.searchsorted(sums, np.arange(0, max(1, int(sums[-1])), _AT_ONCE), side="left")
    for begin, end in pairwise([*np.unique(bounds).tolist(), m]):
        b = np.repeat(np.arange(begin, end, dtype=np.int64), counts[begin:end])
        within = np.arange(len(b), dtype=np.int64)
        within -= np.repeat(np.cumsum(counts[begin:end]) - counts[begin:end], counts[begin:end])
        yield order[low[b] + within].astype(np.int64), b


def covers(boxes: Boxes, shape: Sequence[int]) -> bool:
    """Whether there is one box, and it is the whole tensor: the usual case, told quickly."""
    return (
        len(boxes) == 1
        and boxes.size[0].tolist() == list(shape)
        and not any(boxes.start[0].tolist())
    )


def untiled(shape: Sequence[int], boxes: Boxes) -> str:
    """Why boxes do not cover a tensor exactly once, or an empty string.

    Args:
        shape: of the tensor.
        boxes: that should tile it.

    Returns:
        the first hole or overlap in words.
    """
    if covers(boxes, shape):
        return ""
    bounds = np.array(shape, np.int64)
    outside = (boxes.start < 0) | (boxes.end > bounds)
    if outside.any():
        row = int(outside.any(axis=1).argmax())
        return f"{_words(boxes, row)} lies outside of {list(shape)}"
    volume = boxes.volume
    filled = boxes if volume.all() else boxes.take(volume > 0)
    twice = _twice(bounds, filled)
    if twice is not None:
        return f"{_words(twice, 0)} is there twice"
    missing = math.prod(shape) - int(volume.sum())
    if missing:
        return f"{missing:,} of {math.prod(shape):,} elements are missing{_hole(shape, filled)}"
    return ""


def _twice(shape: Table, boxes: Boxes) -> Boxes | None:
    """The first common part of two boxes, none of which is empty, if there is any."""
    whole = boxes.size == shape
    cut = ~whole.all(axis=0)
    if not cut.any() and len(boxes) < 2:
        return None
    if _ordered(shape[cut], boxes, cut, whole):
        return None
    a, b, common = overlaps(boxes, boxes)
    twice = np.flatnonzero(a != b)
    return common.take(twice[:1]) if len(twice) else None


def _ordered(shape: Table, boxes: Boxes, cut: NDArray[np.bool_], whole: NDArray[np.bool_]) -> bool:
    """Whether boxes are ranges of elements one after the other, which is quickly told.

    Dimensions that no box cuts do not matter. What is left is a range of elements where a box is
    whole behind a dimension and one index thick before it.
    """
    dims = len(shape)
    if not dims:
        return False
    start, size = boxes.start[:, cut], boxes.size[:, cut]
    if dims > 1:
        thin, whole = size == 1, whole[:, cut]
        before, behind = np.ones(len(boxes), np.bool_), [np.ones(len(boxes), np.bool_)]
        for dim in range(dims - 1, 0, -1):
            behind.append(behind[-1] & whole[:, dim])
        ranges = np.zeros(len(boxes), np.bool_)
        for dim in range(dims):
            ranges |= before & behind[dims - 1 - dim]
            before &= thin[:, dim]
        if not ranges.all():
            return False
    steps = np.cumprod(np.concatenate([[1], shape[:0:-1]]))[::-1]
    first = start @ steps
    last = first + size.prod(axis=1)
    order = np.argsort(first, kind="stable")
    return bool((last[order[:-1]] <= first[order[1:]]).all())


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
