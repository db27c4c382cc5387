"""Plans of copies: which parts of which pieces go where, proven before a byte is moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_ucp.execution.apart import require_apart
from core_ucp.targets.target import Target, Wanted
from core_ucp.view.boxes import Boxes, Table, covers, overlaps, untiled
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

BLOCK = 8 * 2**20
"""Bytes that are in memory at once, for each worker."""


@dataclass(frozen=True, eq=False)
class Copies:
    """How one wanted atom is filled, block by block.

    Attributes:
        wanted: what is filled.
        source: the atom that it is filled from.
        blocks: parts of the wanted pieces of at most ``BLOCK`` bytes, and where they go.
        parts: parts of the source's pieces, grouped by the block that they belong to.
        first: row of ``parts`` where each block's begin, shape ``(n + 1,)``.
        dense: whether the elements of each block lie in the new file without gaps, shape ``(n,)``.
        digested: whether the blocks tile the atom exactly once, and its digest is taken from them.
    """

    wanted: Wanted
    source: Atom
    blocks: Pieces
    parts: Pieces
    first: Table
    dense: NDArray[np.bool_]
    digested: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """A conversion that has been proven: every byte has exactly one source."""

    view: View
    target: Target
    copies: tuple[Copies, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that are written."""
        return sum(
            int(c.blocks.boxes.volume.sum()) * c.wanted.atom.dtype.itemsize for c in self.copies
        )


def plan(view: View, target: Target) -> Plan:
    """Compile a view and a target into copies, and prove them.

    Raises:
        CheckpointError: when an atom of the source has a hole or an overlap, when the target wants
            what the source lacks, or when two atoms would be written to one place.
    """
    view.prove()
    digested = _digested(view, target)
    copies = (_copies(view, wanted, wanted in digested) for wanted in target.wanted)
    made = Plan(view, target, tuple(copies))
    require_apart(made)
    return made


def _digested(view: View, target: Target) -> set[Wanted]:
    """For every atom that is written as a whole, the copy whose digest is taken.

    That is one without rounding, where there is one: its digest is also that of the source.
    """
    found: dict[str, Wanted] = {}
    for wanted in target.wanted:
        exact = wanted.key in view.atoms and view.atoms[wanted.key].stored == wanted.atom.dtype
        better = wanted.key not in found or (
            exact and found[wanted.key].atom.dtype != wanted.atom.dtype
        )
        if better and not untiled(wanted.atom.shape, wanted.atom.pieces.boxes):
            found[wanted.key] = wanted
    return set(found.values())


def _copies(view: View, wanted: Wanted, digested: bool) -> Copies:
    source = _source(view, wanted)
    atom = wanted.atom
    blocks = in_blocks(atom.pieces, max(atom.dtype.itemsize, source.stored.itemsize))
    if covers(blocks.boxes, atom.shape):
        # One block of the whole: all pieces of the source are its parts, as they are.
        parts = source.pieces.filled
        first = np.array([0, len(parts)], np.int64)
        dense = dense_rows(blocks, atom.dtype.itemsize)
        return Copies(wanted, source, blocks, parts, first, dense, digested)
    rows, block, common = overlaps(source.pieces.boxes, blocks.boxes)
    missing = int(blocks.boxes.volume.sum() - common.volume.sum())
    if missing:
        raise CheckpointError(f"{view.path} lacks {missing:,} elements of {wanted.key}")
    order = np.argsort(block, kind="stable")
    first = np.searchsorted(block[order], np.arange(len(blocks) + 1))
    parts = source.pieces.cut(rows[order], common.take(order))
    dense = dense_rows(blocks, atom.dtype.itemsize)
    return Copies(wanted, source, blocks, parts, first.astype(np.int64), dense, digested)


def _source(view: View, wanted: Wanted) -> Atom:
    """The stored tensor that serves best: a copy in the wanted dtype before one to be rounded."""
    found = view.atoms.get(wanted.key)
    if found is None:
        raise CheckpointError(f"{view.path} has no {wanted.key}")
    twin = view.twins.get(wanted.key)
    if twin is not None and twin.dtype == wanted.atom.dtype != found.dtype:
        found = twin
    if found.shape != wanted.atom.shape:
        raise CheckpointError(
            f"{wanted.key} is wanted as {list(wanted.atom.shape)}",
            why=f"{view.path} has it as {list(found.shape)}",
        )
    if found.dtype != wanted.atom.dtype and not _castable(found.dtype, wanted.atom.dtype):
        raise CheckpointError(
            f"{wanted.key} is {found.dtype} and cannot become {wanted.atom.dtype}",
            why="only floating point numbers are rounded to other floating point numbers",
        )
    return found


def _castable(source: torch.dtype, target: torch.dtype) -> bool:
    return source.is_floating_point and target.is_floating_point


def in_blocks(pieces: Pieces, itemsize: int) -> Pieces:
    """Pieces cut so that none is larger than ``BLOCK`` bytes."""
    if not len(pieces) or int(pieces.boxes.volume.max()) * itemsize <= BLOCK:
        return pieces.filled
    rows: list[int] = []
    boxes: list[tuple[list[int], list[int]]] = []
    starts, sizes = pieces.boxes.start.tolist(), pieces.boxes.size.tolist()
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        found = _cut(start, size, BLOCK // itemsize)
        rows += [row] * len(found)
        boxes += found
    return pieces.cut(np.array(rows, np.int64), Boxes.of(boxes, pieces.boxes.start.shape[1]))


def _cut(start: list[int], size: list[int], limit: int) -> list[tuple[list[int], list[int]]]:
    """Boxes of at most ``limit`` elements that tile a box, in row-major order."""
    volume = math.prod(size)
    if volume <= limit:
        return [(start, size)] if volume else []
    dim = next(d for d in range(len(size)) if size[d] > 1)
    step = max(1, limit // (volume // size[dim]))
    found: list[tuple[list[int], list[int]]] = []
    for begin in range(0, size[dim], step):
        corner, extent = start.copy(), size.copy()
        corner[dim] += begin
        extent[dim] = min(step, size[dim] - begin)
        found += _cut(corner, extent, limit)
    return found


def dense_rows(pieces: Pieces, itemsize: int) -> NDArray[np.bool_]:
    """Which pieces lie in row-major order without gaps, shape ``(n,)``."""
    sizes = pieces.boxes.size
    expected = np.full_like(sizes, itemsize)
    expected[:, :-1] *= np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    dense: NDArray[np.bool_] = ((pieces.stride == expected) | (sizes == 1)).all(axis=1)
    return dense
