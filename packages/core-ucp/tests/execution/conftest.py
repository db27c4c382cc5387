"""Views and targets of any cut, made by hand: what sources and targets make of real checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from core_ucp.targets.target import NewFile, Target, Wanted
from core_ucp.view.boxes import Boxes
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces, join, row_major
from core_ucp.view.view import Atom, View

KEY = "model.w"


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Cut:
    """How a tensor is cut into files: ranges of its elements, or of one dimension."""

    dim: int | None
    places: tuple[int, ...]

    def ranges(self, length: int) -> list[tuple[int, int]]:
        inner = sorted(place % (length + 1) for place in self.places)
        return list(zip([0, *inner], [*inner, length], strict=True))


@st.composite
def cuts(draw: Any, dims: int) -> Cut:
    dim = draw(st.one_of(st.none(), st.integers(0, dims - 1))) if dims else None
    return Cut(dim, tuple(draw(st.lists(st.integers(0, 1000), max_size=4))))


def stored(folder: Path, tensor: torch.Tensor, cut: Cut) -> View:
    """A view of a tensor that lies in as many files as it was cut into."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, size = tuple(tensor.shape), tensor.element_size()
    pieces, names = [], []
    whole = tensor.numel() if cut.dim is None else shape[cut.dim]
    for number, (begin, end) in enumerate(cut.ranges(whole)):
        if cut.dim is None:
            part = tensor.reshape(-1)[begin:end]
            pieces.append(Pieces.flat(shape, begin, end, number, 3, size))
        else:
            part = tensor.narrow(cut.dim, begin, end - begin)
            start = [begin if dim == cut.dim else 0 for dim in range(len(shape))]
            pieces.append(Pieces.dense(part.shape, number, 3, size, start))
        (folder / str(number)).write_bytes(b"abc" + octets(part))
        names.append(str(number))
    atom = Atom(shape, tensor.dtype, join(pieces))
    return View(folder, "by hand", Files(folder, names), {KEY: atom})


def wanted(tensor: torch.Tensor, order: list[int], dtype: torch.dtype | None = None) -> Target:
    """A file that holds a tensor with its dimensions in another order, behind eight bytes."""
    kind = dtype or tensor.dtype
    shape = tuple(tensor.shape)
    steps = row_major([shape[dim] for dim in order], kind.itemsize)
    stride = [steps[order.index(dim)] for dim in range(len(shape))]
    table = np.array([stride], np.int64).reshape(1, len(shape))
    zero, eight = np.zeros(1, np.int64), np.full(1, 8, np.int64)
    atom = Atom(shape, kind, Pieces(Boxes.whole(shape), zero, eight, table))
    size = 8 + math.prod(shape) * kind.itemsize
    return Target((NewFile("inner/out", size, ((0, b"12345678"),)),), (Wanted(KEY, atom),))


@pytest.fixture
def by_hand() -> SimpleNamespace:
    return SimpleNamespace(cut=Cut, cuts=cuts, stored=stored, wanted=wanted, octets=octets)
