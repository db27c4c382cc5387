"""What ranks hold of one dimension of a tensor, as tables: the arithmetic below every layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core_ucp.view.boxes import Table


@dataclass(frozen=True, eq=False)
class Runs:
    """Ranges of one dimension that a number of ranks hold.

    Attributes:
        row: which of the ranks holds each range, ascending, shape ``(n,)``.
        start: its first index in the whole tensor, shape ``(n,)``.
        local: its first index in the tensor of the rank, shape ``(n,)``.
        size: its length, shape ``(n,)``.
        extent: length of the dimension in the tensor of every rank, shape ``(ranks,)``.
    """

    row: Table
    start: Table
    local: Table
    size: Table
    extent: Table

    @classmethod
    def whole(cls, size: int, ranks: int) -> Runs:
        """All ranks hold all of a dimension."""
        zero, full = np.zeros(ranks, np.int64), np.full(ranks, size, np.int64)
        return cls(np.arange(ranks, dtype=np.int64), zero, zero, full, full)


@dataclass(frozen=True, eq=False)
class Picks:
    """Parts of what ranks hold of a dimension, joined in this order into what they hold then.

    Attributes:
        row: which of the ranks each part belongs to, ascending, shape ``(n,)``.
        begin: its first index in the tensor that the rank had, shape ``(n,)``.
        size: its length, shape ``(n,)``.
    """

    row: Table
    begin: Table
    size: Table

    @classmethod
    def grid(cls, begin: Table, size: Table) -> Picks:
        """The same number of parts for every rank; both arguments of shape ``(ranks, parts)``."""
        ranks, parts = begin.shape
        row = np.repeat(np.arange(ranks, dtype=np.int64), parts)
        return cls(row, begin.reshape(-1), size.reshape(-1))


def pick(runs: Runs, picks: Picks) -> Runs:
    """What ranks hold after each has picked parts of its own."""
    ranks = len(runs.extent)
    place = before(picks.row, picks.size, ranks)
    extent = np.bincount(picks.row, picks.size, ranks).astype(np.int64)
    a, b = pairs(runs.row, picks.row, ranks)
    low = np.maximum(runs.local[a], picks.begin[b])
    high = np.minimum(runs.local[a] + runs.size[a], picks.begin[b] + picks.size[b])
    kept = high > low
    a, b, low = a[kept], b[kept], low[kept]
    start = runs.start[a] + low - runs.local[a]
    return Runs(runs.row[a], start, place[b] + low - picks.begin[b], high[kept] - low, extent)


def before(row: Table, size: Table, ranks: int) -> Table:
    """Sum of the sizes that precede each in its own row, for rows in ascending order."""
    sums = np.cumsum(size) - size
    counts = np.bincount(row, minlength=ranks)
    first = np.cumsum(counts) - counts
    return sums - sums[first[row]] if len(row) else sums


def pairs(left: Table, right: Table, ranks: int) -> tuple[Table, Table]:
    """All pairs of entries with equal rows of two ascending tables, the right one outermost.

    Returns:
        entries of the left and of the right.
    """
    counts = np.bincount(left, minlength=ranks)
    first = np.cumsum(counts) - counts
    repeats = counts[right]
    b = np.repeat(np.arange(len(right), dtype=np.int64), repeats)
    a = np.arange(len(b), dtype=np.int64) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return a + first[right[b]], b
