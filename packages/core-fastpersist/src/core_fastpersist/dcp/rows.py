"""Split rows of tensors among writers, so that all of them write the same number of bytes.

Planning only: it knows counts and widths, and neither tensors nor ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from core.errors import CheckpointError


@dataclass(frozen=True, order=True)
class Run:
    """Rows of one tensor that follow each other.

    Args:
        tensor: index of the tensor.
        first: index of the first row.
        count: number of rows; zero only where the tensor has none.
    """

    tensor: int
    first: int
    count: int


def ends(total: int, writers: int) -> list[int]:
    """Where each writer's ideal byte range ends; it begins where that of the writer before ends.

    Every range has ``total // writers`` bytes, and the first ``total % writers`` one more: the
    byte split of FastPersist (arXiv 2406.13768).
    """
    each, more = divmod(total, writers)
    return list(accumulate([each + 1] * more + [each] * (writers - more)))


def split(rows: Sequence[int], widths: Sequence[int], writers: int) -> list[list[Run]]:
    """Give every row of every tensor to one writer.

    The rows of all tensors are laid out in order. A writer gets those that lie wholly inside its
    ideal byte range. The at most ``writers - 1`` rows that lie across a boundary follow, widest
    first, each for the writer that has the fewest bytes. So the bytes of two writers differ by at
    most the widest row: the fullest writer had the fewest bytes when it got its last row, or it
    got no such row and has no more than its range. Takes
    O(tensors + writers log writers), however many rows there are.

    Args:
        rows: number of rows of every tensor.
        widths: bytes of one row of every tensor.
        writers: number of writers.

    Returns:
        For every writer its rows in order of tensors and rows, neighbours in one run. Tensors
        without bytes are with the first writer.

    Raises:
        CheckpointError: for negative numbers, lists that differ in length, or no writer.
    """
    if writers < 1 or len(rows) != len(widths) or min(rows, default=0) < 0:
        raise CheckpointError("rows cannot be split", why=f"{len(rows)} tensors, {writers} writers")
    if min(widths, default=0) < 0:
        raise CheckpointError("rows cannot be split", why="a row is less than no bytes wide")
    inside, across = _lay(rows, widths, writers)
    _deal(inside, across, widths)
    return [_merged(runs) for runs in inside]


def _lay(
    rows: Sequence[int], widths: Sequence[int], writers: int
) -> tuple[list[list[Run]], list[Run]]:
    """The runs inside each ideal range, and the single rows across boundaries."""
    bounds = ends(sum(map(_product, rows, widths)), writers)
    given: list[list[Run]] = [[] for _ in range(writers)]
    across: list[Run] = []
    writer = begin = 0
    for tensor, (count, width) in enumerate(zip(rows, widths, strict=True)):
        if count * width == 0:
            given[0].append(Run(tensor, 0, count))
            continue
        row = 0
        while row < count:
            while bounds[writer] <= begin + row * width:
                writer += 1
            fitting = min(count, (bounds[writer] - begin) // width)
            if fitting > row:
                given[writer].append(Run(tensor, row, fitting - row))
            if fitting < count and (bounds[writer] - begin) % width:
                across.append(Run(tensor, fitting, 1))
                fitting += 1
            row = fitting
        begin += count * width
    return given, across


def _product(count: int, width: int) -> int:
    return count * width


def _deal(given: list[list[Run]], across: list[Run], widths: Sequence[int]) -> None:
    """Give the rows across boundaries, widest first, to the writer with the fewest bytes."""
    loads = [
        (sum(run.count * widths[run.tensor] for run in runs), writer)
        for writer, runs in enumerate(given)
    ]
    heapq.heapify(loads)
    for run in sorted(across, key=lambda run: (-widths[run.tensor], run)):
        bytes_, writer = loads[0]
        given[writer].append(run)
        heapq.heapreplace(loads, (bytes_ + widths[run.tensor], writer))


def _merged(runs: list[Run]) -> list[Run]:
    ordered = sorted(runs)
    merged = ordered[:1]
    for before, run in pairwise(ordered):
        if run.tensor == before.tensor and run.first == before.first + before.count:
            last = merged[-1]
            merged[-1] = Run(last.tensor, last.first, last.count + run.count)
        else:
            merged.append(run)
    return merged
