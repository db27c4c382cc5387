"""The mean of copies that were trained apart: the only operation that loses something."""

from __future__ import annotations

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom


def mean(name: str, atom: Atom, files: Files) -> torch.Tensor:
    """The arithmetic mean of the first copy of an atom and its replicas.

    It is computed in double precision and rounded once. The paper's ``params_to_average`` are
    small (norms and biases), so all copies are read into memory.

    Args:
        name: of the atom, for messages.
        atom: whose replicas are the other copies.
        files: that it lies in.

    Raises:
        CheckpointError: when it is no floating-point tensor, or some elements have more copies
            than others.
    """
    if not atom.dtype.is_floating_point or atom.exponent:
        raise CheckpointError(f"{name} cannot be averaged", why=f"it is of {atom.dtype}")
    total = torch.zeros(atom.shape, dtype=torch.float64)
    count = torch.zeros(atom.shape, dtype=torch.int64)
    copies_of = [atom.pieces] if atom.replicas is None else [atom.pieces, atom.replicas]
    for pieces in copies_of:
        for row in range(len(pieces)):
            _add(total, count, pieces, row, atom.dtype, files)
    copies = int(count.max()) if count.numel() else 1
    if count.numel() and int(count.min()) != copies:
        raise CheckpointError(
            f"{name} cannot be averaged",
            why=f"some elements have {int(count.min())} copies and others {copies}",
        )
    return (total / copies).to(atom.dtype)


def _add(
    total: torch.Tensor,
    count: torch.Tensor,
    pieces: Pieces,
    row: int,
    dtype: torch.dtype,
    files: Files,
) -> None:
    """Add one piece to the sum of the copies."""
    start, size = pieces.boxes.start[row].tolist(), pieces.boxes.size[row].tolist()
    steps = pieces.stride[row] // dtype.itemsize
    reach = 1 + int(((np.array(size, np.int64) - 1) * steps).sum())
    held = torch.empty(reach, dtype=dtype)
    buffer = held.view(torch.uint8).numpy().data
    files.read_into(int(pieces.file[row]), int(pieces.offset[row]), buffer)
    box = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
    total[box] += held.as_strided(size, steps.tolist()).double()
    count[box] += 1
