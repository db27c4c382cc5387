"""Pieces: bytes of boxes, whole, cut, and as ranges of a flat buffer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from core_ucp.view.boxes import Boxes
from core_ucp.view.pieces import Pieces, join, nowhere, row_major


def read(shape: tuple[int, ...], pieces: Pieces, buffers: list[bytes]) -> np.ndarray:
    """The int64 tensor that pieces make; elements that none holds are -1."""
    out = np.full(shape, -1, np.int64)
    for row in range(len(pieces)):
        box = tuple(
            slice(a, a + b)
            for a, b in zip(pieces.boxes.start[row], pieces.boxes.size[row], strict=True)
        )
        out[box] = np.ndarray(
            tuple(pieces.boxes.size[row]),
            np.int64,
            buffers[int(pieces.file[row])],
            int(pieces.offset[row]),
            tuple(int(step) for step in pieces.stride[row]),
        )
    return out


def test_dense_pieces_are_the_tensor() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    assert (
        read(x.shape, Pieces.dense(x.shape, 1, 8, 8), [b"", b"8 bytes." + x.tobytes()]) == x
    ).all()
    part = Pieces.dense((1, 3, 4), 0, 0, 8, start=(1, 0, 0))
    assert (read(x.shape, part, [x[1].tobytes()])[1] == x[1]).all()


@given(st.data())
def test_ranges_of_a_flat_buffer_are_the_elements(data: st.DataObject) -> None:
    x = np.arange(30).reshape(2, 5, 3)
    cuts = sorted(data.draw(st.sets(st.integers(0, 30), max_size=5)) | {0, 30})
    first, last = np.array(cuts[:-1]), np.array(cuts[1:])
    buffers = [bytes(16) + x.reshape(-1)[a:b].tobytes() for a, b in zip(first, last, strict=True)]
    files = np.arange(len(first))
    row, pieces = Pieces.ranges(x.shape, first, last, files, np.full(len(first), 16), 8)
    assert (pieces.file == files[row]).all()
    assert (read(x.shape, pieces, buffers) == x).all()
    single = [
        Pieces.flat(x.shape, a, b, f, 16, 8) for a, b, f in zip(first, last, files, strict=True)
    ]
    assert (read(x.shape, join(single), buffers) == x).all()


def test_a_cut_piece_is_the_same_elements() -> None:
    x = np.arange(20).reshape(4, 5)
    inner = Boxes.of([([1, 2], [2, 3]), ([0, 0], [1, 1])], 2)
    parts = Pieces.dense(x.shape, 0, 0, 8).cut(np.array([0, 0]), inner)
    found = read(x.shape, parts, [x.tobytes()])
    assert (found[1:3, 2:5] == x[1:3, 2:5]).all()
    assert found[0, 0] == 0
    assert (found == -1).sum() == 13


@pytest.mark.parametrize("shape", [(), (7,), (3, 0, 2), (2, 3, 4)])
def test_row_major_steps_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    if 0 not in shape:
        assert tuple(row_major(shape, 8)) == np.empty(shape, np.int64).strides
    assert len(nowhere(len(shape))) == 0
