"""What lenses do to tables of pieces: parts of dimensions moved, dimensions exchanged or added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from core_ucp.view.boxes import Boxes, Table, overlaps
from core_ucp.view.pieces import Pieces, join
from core_ucp.view.view import Atom


def moved(pieces: Pieces, dim: int, source: Table, target: Table, size: Table) -> Pieces:
    """Pieces of a tensor that takes ranges of a dimension from another one.

    Args:
        pieces: of the other tensor.
        dim: that ranges are taken of.
        source: first index of each range in the other tensor, shape ``(n,)``.
        target: first index of each range in the new tensor, shape ``(n,)``.
        size: length of each, shape ``(n,)``.
    """
    side = slice(dim, dim + 1)
    left = Boxes(pieces.boxes.start[:, side], pieces.boxes.size[:, side])
    a, b, common = overlaps(left, Boxes(source[:, None], size[:, None]))
    start, extent = pieces.boxes.start[a], pieces.boxes.size[a]
    start[:, side], extent[:, side] = common.start, common.size
    cut = pieces.cut(a, Boxes(start, extent))
    there = start.copy()
    there[:, dim] += (target - source)[b]
    return Pieces(Boxes(there, extent), cut.file, cut.offset, cut.stride)


def taken(atom: Atom, dim: int, begin: int, size: int) -> Atom:
    """The atom of a range of a dimension."""
    return reordered(atom, dim, np.array([begin]), np.array([0]), np.array([size]))


def reordered(atom: Atom, dim: int, source: Table, target: Table, size: Table) -> Atom:
    """The atom that is made of ranges of a dimension, see :func:`moved`."""
    extent = int(size.sum())
    shape = (*atom.shape[:dim], extent, *atom.shape[dim + 1 :])
    return _changed(atom, shape, lambda pieces: moved(pieces, dim, source, target, size))


def transposed(atom: Atom, order: Sequence[int]) -> Atom:
    """The atom with its dimensions in another order."""
    columns = list(order)

    def change(pieces: Pieces) -> Pieces:
        boxes = Boxes(pieces.boxes.start[:, columns], pieces.boxes.size[:, columns])
        return replace(pieces, boxes=boxes, stride=pieces.stride[:, columns])

    return _changed(atom, tuple(atom.shape[dim] for dim in order), change)


def joined(atoms: Sequence[Atom], dim: int) -> Atom:
    """The atom of several ones, one behind the other along a dimension."""
    widths = [atom.shape[dim] for atom in atoms]
    shape = (*atoms[0].shape[:dim], sum(widths), *atoms[0].shape[dim + 1 :])
    shifted: list[Atom] = []
    first = 0
    for atom, width in zip(atoms, widths, strict=True):
        shifted.append(_shifted(atom, dim, first))
        first += width
    return _united(shifted, shape)


def stacked(atoms: Sequence[Atom], dim: int) -> Atom:
    """The atom of several ones of equal shape, along a new dimension."""
    return joined([_with_dim(atom, dim) for atom in atoms], dim)


def unstacked(atom: Atom, dim: int) -> list[Atom]:
    """The atoms of all indices of a dimension, without the dimension."""
    parts = [taken(atom, dim, index, 1) for index in range(atom.shape[dim])]
    return [_without_dim(part, dim) for part in parts]


def copies(atoms: Sequence[Atom]) -> Atom:
    """The first of several atoms that must be equal; the others are its replicas."""
    first = atoms[0]
    others = [
        part
        for atom in atoms
        for part in (atom.pieces if atom is not first else None, atom.replicas)
        if part is not None
    ]
    return replace(first, replicas=join(others) if others else None)


def _changed(atom: Atom, shape: tuple[int, ...], change: Callable[[Pieces], Pieces]) -> Atom:
    replicas = None if atom.replicas is None else change(atom.replicas)
    return replace(atom, shape=shape, pieces=change(atom.pieces), replicas=replicas)


def _shifted(atom: Atom, dim: int, by: int) -> Atom:
    def change(pieces: Pieces) -> Pieces:
        start = pieces.boxes.start.copy()
        start[:, dim] += by
        return replace(pieces, boxes=Boxes(start, pieces.boxes.size))

    return _changed(atom, atom.shape, change)


def _with_dim(atom: Atom, dim: int) -> Atom:
    def change(pieces: Pieces) -> Pieces:
        boxes = Boxes(
            np.insert(pieces.boxes.start, dim, 0, axis=1),
            np.insert(pieces.boxes.size, dim, 1, axis=1),
        )
        return replace(pieces, boxes=boxes, stride=np.insert(pieces.stride, dim, 0, axis=1))

    return _changed(atom, (*atom.shape[:dim], 1, *atom.shape[dim:]), change)


def _without_dim(atom: Atom, dim: int) -> Atom:
    def change(pieces: Pieces) -> Pieces:
        boxes = Boxes(
            np.delete(pieces.boxes.start, dim, axis=1), np.delete(pieces.boxes.size, dim, axis=1)
        )
        return replace(pieces, boxes=boxes, stride=np.delete(pieces.stride, dim, axis=1))

    return _changed(atom, (*atom.shape[:dim], *atom.shape[dim + 1 :]), change)


def _united(atoms: Sequence[Atom], shape: tuple[int, ...]) -> Atom:
    replicas = [atom.replicas for atom in atoms if atom.replicas is not None]
    return replace(
        atoms[0],
        shape=shape,
        pieces=join([atom.pieces for atom in atoms]),
        replicas=join(replicas) if replicas else None,
    )
