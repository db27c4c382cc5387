"""Optimizer states as flat ranges, as Megatron-core up to 0.14 kept them in the model's space.

A tensor of shape ``(X, Y)`` that tensor parallelism has cut into a grid of ``(f, g)`` blocks lies in
the folder as one of shape ``(f, g, X/f * Y/g)``, whose last axis the data-parallel ranks share out
in ranges. Later versions of Megatron-core cannot read it any more (Megatron-LM, PR 2126).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_ucp.view import pieces as places
from core_ucp.view.boxes import Boxes
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

_SHAPE = "nd_reformulated_orig_global_shape"


def original_shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that lie there as flat ranges, by key."""
    data: Any = getattr(metadata, "mcore_data", None)
    if not isinstance(data, Mapping):
        return {}
    return {
        str(key): tuple(int(size) for size in entry[_SHAPE])
        for key, entry in data.items()
        if isinstance(entry, Mapping) and _SHAPE in entry
    }


def restored(key: str, atom: Atom, shape: tuple[int, ...]) -> Atom:
    """The tensor as it was before it was flattened.

    Args:
        key: of the tensor, for messages.
        atom: the tensor of the folder, of one dimension more than the original.
        shape: of the original.

    Raises:
        CheckpointError: when the two shapes do not belong together.
    """
    grid = atom.shape[:-1]
    fits = len(grid) == len(shape) and all(
        count > 0 and size % count == 0 for count, size in zip(grid, shape, strict=True)
    )
    block = tuple(size // count for count, size in zip(grid, shape, strict=True)) if fits else ()
    if not fits or math.prod(block) != atom.shape[-1]:
        raise CheckpointError(
            f"{key} cannot be unflattened",
            why=f"it is stored as {list(atom.shape)} and should be {list(shape)}",
        )
    table, itemsize = atom.pieces, atom.dtype.itemsize
    found = []
    for row in range(len(table)):
        start, size = table.boxes.start[row], table.boxes.size[row]
        begin = int(start[-1])
        for step in np.ndindex(*size[:-1].tolist()):
            offset = int(table.offset[row] + (table.stride[row, :-1] * step).sum())
            part = Pieces.flat(block, begin, begin + int(size[-1]), 0, offset, itemsize)
            corner = (start[:-1] + np.array(step, np.int64)) * np.array(block, np.int64)
            moved = Boxes(part.boxes.start + corner, part.boxes.size)
            file = np.full(len(part), table.file[row], np.int64)
            found.append(Pieces(moved, file, part.offset, part.stride))
    pieces = places.join(found) if found else places.nowhere(len(shape))
    return Atom(shape, atom.dtype, pieces, atom.relation)
