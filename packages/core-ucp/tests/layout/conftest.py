"""Views of tensors that are cut into pieces in one file, and the tensors that views stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_ucp.view.boxes import Boxes
from core_ucp.view.files import Files
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.pieces import Pieces, row_major
from core_ucp.view.view import Atom, Relation, Resume, View

Arrays = Mapping[str, Mapping[str, np.ndarray]]
"""Tensors by parameter and role: the empty string for the weight, or the name of a state."""

Build = Callable[..., View]
Read = Callable[[View], dict[str, np.ndarray]]


def _pieces(shape: tuple[int, ...], offset: int) -> Pieces:
    """A tensor in two halves along its last dimension, as tensor parallelism might leave it."""
    if not shape:
        return Pieces.dense(shape, 0, offset, 8)
    half = shape[-1] // 2
    sides = [([0] * len(shape), [*shape[:-1], half])]
    sides.append(([0] * (len(shape) - 1) + [half], [*shape[:-1], shape[-1] - half]))
    boxes = Boxes.of(sides, len(shape))
    stride = np.tile(np.array(row_major(shape, 8), np.int64), (2, 1))
    first = offset + (boxes.start * stride).sum(axis=1)
    return Pieces(boxes, np.zeros(2, np.int64), first, stride)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Makes a view of tensors; 0-d ones are scalars of their parameter."""

    def make(
        arrays: Arrays,
        hyper: Mapping[str, Mapping[str, Any]] | None = None,
        aliases: Mapping[str, str] | None = None,
        relations: Mapping[str, Relation] | None = None,
    ) -> View:
        folder = tmp_path_factory.mktemp("view")
        content, atoms = b"", {}
        for name, roles in arrays.items():
            for role, array in roles.items():
                scalar: Relation = "scalar" if array.ndim == 0 and role else "elementwise"
                key = state_key(name, role) if role else weight_key(name)
                pieces = _pieces(array.shape, len(content))
                relation = (relations or {}).get(role, scalar)
                atoms[key] = Atom(array.shape, torch.int64, pieces, relation)
                content += array.astype(np.int64).tobytes()
        atoms["extra.rng"] = Atom((), torch.int64, Pieces.dense((), 0, 0, 8))
        (Path(folder) / "data.bin").write_bytes(content + bytes(8))
        files = Files(folder, ["data.bin"])
        twins = {k: a for k, a in atoms.items() if k.startswith("model.")}
        resume = Resume(hyper=hyper or {})
        return View(folder, "test", files, atoms, aliases or {}, twins, resume)

    return make


@pytest.fixture(scope="session")
def read() -> Read:
    """Reads all tensors of a view, after the proof that they are whole."""

    def of(view: View) -> dict[str, np.ndarray]:
        view.prove()
        content = view.files.path(0).read_bytes()
        found: dict[str, np.ndarray] = {}
        for key, atom in view.atoms.items():
            out = np.full(atom.shape, -1, np.int64)
            pieces = atom.pieces
            for row, (start, end) in enumerate(
                zip(pieces.boxes.start, pieces.boxes.end, strict=True)
            ):
                box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
                steps = tuple(int(step) for step in pieces.stride[row])
                shape, first = out[box].shape, int(pieces.offset[row])
                if out[box].size:
                    out[box] = np.ndarray(shape, np.int64, content, first, steps)
            found[key] = out
        return found

    return of
