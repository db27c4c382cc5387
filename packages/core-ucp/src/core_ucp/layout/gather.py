"""Atoms from the tensors that coordinates hold under a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_ucp.layout.holders import Average, steps
from core_ucp.layout.layout import Layout
from core_ucp.layout.mesh import Coordinate, Mesh
from core_ucp.layout.placement import Placements
from core_ucp.view.boxes import Boxes, Table, overlaps, untiled
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, Relation


class Local(NamedTuple):
    """The row-major tensor that a coordinate holds.

    Attributes:
        file: index of its file.
        offset: byte of its first element.
        shape: of the tensor.
    """

    file: int
    offset: int
    shape: Sequence[int]


def gather(
    name: str,
    layout: Layout,
    mesh: Mesh,
    local: Mapping[Coordinate, Local],
    dtype: torch.dtype,
    *,
    shape: Sequence[int] | None = None,
    relation: Relation = "elementwise",
    lossy: bool = False,
) -> Atom:
    """One atom from the tensors that coordinates hold.

    The first copy of every element becomes the atom's pieces, all others its replicas.

    Args:
        name: of the atom, for messages.
        layout: under which it lies on the mesh.
        mesh: of the ranks.
        local: tensors by coordinate.
        dtype: of the elements.
        shape: of the whole tensor where it is known; told from the local shapes unless given.
        relation: of the atom to its parameter.
        lossy: whether copies that are to be averaged are allowed; they become replicas, whose mean
            is :func:`core_ucp.layout.averaging.mean`.

    Raises:
        CheckpointError: when a coordinate is missing, the shapes do not fit, or the copies are to
            be averaged, naming the atom.
    """
    if not lossy and any(isinstance(step, Average) for step in steps(layout)):
        raise CheckpointError(
            f"{name} is the mean of copies that differ",
            why=f"{layout} loses what they differ in",
            fix="set `lossy = true` in the rules if that is what you want",
        )
    try:
        fit = layout.fit({at: tensor.shape for at, tensor in local.items()}, mesh)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} cannot be put together: {error.what}", why=error.why, fix=error.fix
        ) from error
    whole = fit.shape
    if shape is not None and whole != tuple(shape):
        raise CheckpointError(f"{name} is of {list(whole)}", why=f"it should be {list(shape)}")
    pieces = _located(fit.placed, [local[at] for at in fit.order], dtype.itemsize)
    first = first_copies(pieces.boxes)
    problem = untiled(whole, pieces.boxes.take(first))
    if problem and len(pieces) > 1:
        # Copies can be cut in different places; then their common parts are the copies.
        pieces = refined(pieces)
        first = first_copies(pieces.boxes)
        problem = untiled(whole, pieces.boxes.take(first))
    if problem:
        raise CheckpointError(f"{name} cannot be put together under {fit.layout}", why=problem)
    replicas = pieces.take(~first) if not first.all() else None
    return Atom(whole, dtype, pieces.take(first), relation, replicas)


def first_copies(boxes: Boxes) -> NDArray[np.bool_]:
    """Which boxes are not equal to one before them, shape ``(n,)``."""
    table = np.concatenate([boxes.start, boxes.size], axis=1)
    kept = np.zeros(len(table), np.bool_)
    if table.shape[1]:
        kept[np.unique(table, axis=0, return_index=True)[1]] = True
    else:
        kept[:1] = True
    return kept


def refined(pieces: Pieces) -> Pieces:
    """The same pieces, cut wherever any of them begins or ends."""
    for dim in range(pieces.stride.shape[1]):
        boxes = pieces.boxes
        cuts = np.unique(np.concatenate([boxes.start[:, dim], boxes.end[:, dim]]))
        side = slice(dim, dim + 1)
        cells = Boxes(cuts[:-1, None], np.diff(cuts)[:, None])
        _, row, common = overlaps(cells, Boxes(boxes.start[:, side], boxes.size[:, side]))
        start, size = boxes.start[row], boxes.size[row]
        start[:, side], size[:, side] = common.start, common.size
        pieces = pieces.cut(row, Boxes(start, size))
    return pieces


def _located(placed: Placements, tensors: Sequence[Local], itemsize: int) -> Pieces:
    """Pieces of the boxes of all ranks."""
    after = np.cumprod(placed.shapes[:, ::-1], axis=1, dtype=np.int64)[:, ::-1]
    steps_of: Table = np.ones_like(placed.shapes)
    steps_of[:, :-1] = after[:, 1:]
    stride = steps_of[placed.row] * itemsize
    file = np.array([tensor.file for tensor in tensors], np.int64)
    offset = np.array([tensor.offset for tensor in tensors], np.int64)
    moved = (placed.local * stride).sum(axis=1)
    return Pieces(placed.boxes, file[placed.row], offset[placed.row] + moved, stride)
