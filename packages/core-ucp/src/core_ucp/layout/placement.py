"""Which boxes of a tensor ranks hold, and where in their own row-major tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core_ucp.layout.runs import Runs, pairs
from core_ucp.view.boxes import Boxes, Table
from core_ucp.view.pieces import Pieces, row_major


@dataclass(frozen=True, eq=False)
class Placement:
    """What one coordinate holds of a tensor.

    Attributes:
        boxes: ``n`` boxes of the whole tensor.
        local: first index of each box in the coordinate's own tensor, shape ``(n, d)``.
        shape: of the coordinate's own tensor, padding included.
        held: whether it has such a tensor at all.
    """

    boxes: Boxes
    local: Table
    shape: tuple[int, ...]
    held: bool = True

    @property
    def numel(self) -> int:
        """Number of elements of the coordinate's own tensor, padding included."""
        return math.prod(self.shape) if self.held else 0

    def pieces(self, file: int, offset: int, itemsize: int) -> Pieces:
        """The boxes as pieces of the file that holds the coordinate's own tensor.

        Args:
            file: index of the file.
            offset: byte of the first element of the row-major tensor.
            itemsize: bytes of an element.
        """
        stride = np.array(row_major(self.shape, itemsize), np.int64).reshape(1, len(self.shape))
        strides = np.repeat(stride, len(self.boxes), axis=0)
        files = np.full(len(self.boxes), file, np.int64)
        return Pieces(self.boxes, files, offset + (self.local * strides).sum(axis=1), strides)


@dataclass(frozen=True, eq=False)
class Placements:
    """What many ranks hold of a tensor, in one table.

    Attributes:
        row: the rank of each box, ascending, shape ``(n,)``.
        boxes: ``n`` boxes of the whole tensor.
        local: first index of each box in its rank's own tensor, shape ``(n, d)``.
        shapes: of the ranks' own tensors, shape ``(ranks, d)``.
        held: which ranks have such a tensor at all, shape ``(ranks,)``.
    """

    row: Table
    boxes: Boxes
    local: Table
    shapes: Table
    held: NDArray[np.bool_]

    def one(self, row: int) -> Placement:
        """What the rank in a row holds."""
        first, last = np.searchsorted(self.row, (row, row + 1))
        part = slice(int(first), int(last))
        boxes = Boxes(self.boxes.start[part], self.boxes.size[part])
        shape = tuple(int(size) for size in self.shapes[row])
        return Placement(boxes, self.local[part], shape, bool(self.held[row]))


def crossed(dims: list[Runs | int], held: NDArray[np.bool_]) -> Placements:
    """The boxes whose sides are runs of every dimension.

    Args:
        dims: runs of every dimension, or its size where all ranks hold all of it.
        held: which ranks hold anything.
    """
    ranks = len(held)
    row, chosen = _rows(dims, held)
    for dim, runs in enumerate(dims):
        if isinstance(runs, Runs) and dim not in chosen:
            entry, old = pairs(runs.row, row, ranks)
            chosen = {other: index[old] for other, index in chosen.items()}
            chosen[dim], row = entry, row[old]
    if any(runs == 0 for runs in dims if not isinstance(runs, Runs)):
        row, chosen = row[:0], {dim: entry[:0] for dim, entry in chosen.items()}
    start, size, local = (np.zeros((len(row), len(dims)), np.int64) for _ in range(3))
    shapes = np.zeros((ranks, len(dims)), np.int64)
    for dim, runs in enumerate(dims):
        if isinstance(runs, Runs):
            entry = chosen[dim]
            start[:, dim], size[:, dim] = runs.start[entry], runs.size[entry]
            local[:, dim], shapes[:, dim] = runs.local[entry], runs.extent
        else:
            size[:, dim] = shapes[:, dim] = runs
    return Placements(row, Boxes(start, size), local, shapes, held)


def _rows(dims: list[Runs | int], held: NDArray[np.bool_]) -> tuple[Table, dict[int, Table]]:
    """Rows of the ranks to begin with: those of the first runs, which need no pairing."""
    for dim, runs in enumerate(dims):
        if isinstance(runs, Runs):
            entry = np.flatnonzero(held[runs.row])
            return runs.row[entry], {dim: entry}
    return np.flatnonzero(held), {}
