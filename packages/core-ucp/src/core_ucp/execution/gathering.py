"""Reading a box of an atom from its pieces, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_ucp.view.boxes import Boxes, overlaps
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

Items = NDArray[Any]
"""Elements as opaque items of their size: bits are moved, never values."""

_SPAN = 4 * 2**20
"""Bytes that are read at once where elements lie apart."""
_RUN = 4096
"""Runs of neighbours at least this long, in bytes, are read alone, without what lies between."""


def item_type(itemsize: int) -> np.dtype[Any]:
    """A numpy type for elements of that many bytes."""
    return np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")


def scaled(key: str, values: torch.Tensor, exponent: int) -> torch.Tensor:
    """Elements of an atom times two to a power.

    Raises:
        CheckpointError: when some leave the range of their dtype, naming the atom.
    """
    if not exponent:
        return values
    factor = torch.tensor(exponent, dtype=torch.float64)
    found = torch.ldexp(values, factor).to(values.dtype)
    back = torch.ldexp(found, -factor).to(values.dtype)
    if bool(((back != values) & ~values.isnan()).any()):
        raise CheckpointError(
            f"{key} cannot be multiplied by 2^{exponent}",
            why=f"some of its elements leave the range of {values.dtype}",
        )
    return found


def read_box(files: Files, atom: Atom, start: Sequence[int], into: Items) -> int:
    """Fill an array with a box of an atom, as it is stored (no exponent is applied).

    Args:
        files: that the atom's pieces refer to.
        atom: the tensor.
        start: first index of the box.
        into: array in the shape of the box, of items in the size of the atom's dtype.

    Returns:
        bytes that were read from files.

    Raises:
        CheckpointError: when a file ends early or the disk refuses.
    """
    wanted = Boxes.of([(start, into.shape)], into.ndim)
    rows, _, common = overlaps(atom.pieces.boxes, wanted)
    return read_pieces(files, atom.pieces.cut(rows, common), start, into)


def read_pieces(files: Files, pieces: Pieces, start: Sequence[int], into: Items) -> int:
    """Fill parts of an array from pieces that lie inside of it.

    Args:
        files: that the pieces refer to.
        pieces: boxes of an atom.
        start: index of the array's first element in the atom.
        into: the array; what no piece covers is left as it is.

    Returns:
        bytes that were read from files.
    """
    count = 0
    corner = np.array(start, np.int64)
    begins = (pieces.boxes.start - corner).tolist()
    ends = (pieces.boxes.end - corner).tolist()
    rows = zip(
        begins,
        ends,
        pieces.file.tolist(),
        pieces.offset.tolist(),
        pieces.stride.tolist(),
        strict=True,
    )
    for begin, end, file, offset, stride in rows:
        box: Any = (*(slice(b, e) for b, e in zip(begin, end, strict=True)), ...)
        part = into[box]
        count += _read(files, file, offset, stride, part)
    return count


def _read(files: Files, file: int, offset: int, stride: list[int], into: Items) -> int:
    """Fill an array of any strides from elements of any strides in a file."""
    if not into.size:
        return 0
    run = _run(into.shape, stride, into.itemsize)
    if run == into.nbytes:
        return _read_dense(files, file, offset, into)
    span: int = sum((n - 1) * s for n, s in zip(into.shape, stride, strict=True)) + into.itemsize
    if span <= _SPAN and run < _RUN:
        buffer = np.empty(span, np.uint8)
        files.read_into(file, offset, buffer.data)
        into[...] = as_strided(buffer.view(into.dtype), into.shape, stride)
        return span
    widest = max((d for d in range(into.ndim) if into.shape[d] > 1), key=lambda d: stride[d])
    half = into.shape[widest] // 2
    head, tail = np.split(into, [half], axis=widest)
    count = _read(files, file, offset, stride, head)
    return count + _read(files, file, offset + half * stride[widest], stride, tail)


def _read_dense(files: Files, file: int, offset: int, into: Items) -> int:
    if into.flags.c_contiguous:
        files.read_into(file, offset, into.reshape(-1).view(np.uint8).data)
        return int(into.nbytes)
    if into.nbytes > _SPAN and into.shape[0] > 1:
        half = into.shape[0] // 2
        row = math.prod(into.shape[1:]) * into.itemsize
        count = _read_dense(files, file, offset, into[:half])
        return count + _read_dense(files, file, offset + half * row, into[half:])
    dense: Items = np.empty(into.shape, into.dtype)
    files.read_into(file, offset, dense.reshape(-1).view(np.uint8).data)
    into[...] = dense
    return dense.nbytes


def _run(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes of neighbouring elements that lie side by side in the file."""
    run = itemsize
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n > 1 and s != run:
            break
        run *= n
    return run
