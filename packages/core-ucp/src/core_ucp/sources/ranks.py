"""One pickle of DTensors for each rank, as trainers for reinforcement learning save them (verl).

Beside DTensors they hold plain tensors. Those are the same on all ranks (buffers, steps) and never
a part of a larger one: only a DTensor says that it is a part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.pickles import Inert, Located
from core_ucp.files.trees import Leaves, dotted, walk
from core_ucp.layout.gather import first_copies
from core_ucp.sources.dtensors import CLASSES, is_dtensor, part_of
from core_ucp.sources.full import INERT
from core_ucp.sources.sections import arrange
from core_ucp.view import pieces as places
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

_FILE = re.compile(
    r"(?P<part>model|optim|extra_state)_world_size_(?P<size>\d+)_rank_(?P<rank>\d+)\.pt"
)
_OWN = "extra_state"
"""The part whose tensors belong to the rank that saved them."""


def detect(path: Path) -> bool:
    """Whether a folder holds a file of the model for each rank."""
    return path.is_dir() and any(path.glob("model_world_size_*_rank_*.pt"))


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a folder of one file for each rank and part.

    Args:
        path: the folder.
        rules: not needed, DTensors describe themselves.

    Raises:
        CheckpointError: for a file that is missing, damaged, or wants to run code, and for parts
            that do not add up, naming them.
    """
    size, parts = _names(path)
    files = Files(path)
    leaves: Leaves = {}
    remarks: list[str] = []
    mesh: dict[str, int] = {}
    for part in sorted(parts):
        gathered = _Gathered(part)
        for rank in range(size):
            name = f"{part}_world_size_{size}_rank_{rank}.pt"
            tree = read_archive(files, name, (*CLASSES, *INERT))
            gathered.add(rank, walk(tree), remarks)
        leaves |= gathered.leaves()
        mesh |= gathered.mesh
    found = arrange(files, leaves)
    view = View(
        path=path,
        framework="torch-ranks",
        files=files,
        atoms=found.atoms,
        resume=found.resume,
        mesh=mesh or {"ranks": size},
        details={"ranks": size, "files": len(files)},
        remarks=(*remarks, *found.remarks),
    )
    view.prove()
    return view


def _names(path: Path) -> tuple[int, set[str]]:
    """Number of ranks, and the parts of the state that have files.

    Raises:
        CheckpointError: when a file is missing, or two runs have left theirs.
    """
    matches = [match for file in path.iterdir() if (match := _FILE.fullmatch(file.name))]
    sizes = sorted({int(match["size"]) for match in matches})
    if len(sizes) != 1:
        raise CheckpointError(
            f"{path} holds files of {' and of '.join(map(str, sizes))} ranks",
            fix="remove those of the other run",
        )
    (size,) = sizes
    present = {match.group() for match in matches}
    parts = {match["part"] for match in matches}
    for part in sorted(parts):
        for rank in range(size):
            name = f"{part}_world_size_{size}_rank_{rank}.pt"
            if name not in present:
                raise CheckpointError(f"{path / name} is missing", why=f"there were {size} ranks")
    return size, parts


@dataclass
class _Tensor:
    """A tensor whose parts are found file by file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Pieces] = field(default_factory=list)

    def atom(self) -> Atom:
        """The tensor, with each box once; further copies are replicas."""
        found = places.join(self.parts)
        once = first_copies(found.boxes)
        replicas = None if once.all() else found.take(~once)
        return Atom(self.shape, self.dtype, found.take(once), replicas=replicas)


class _Gathered:
    """One part of the state, put together from the files of all ranks."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.mesh: dict[str, int] = {}
        self._tensors: dict[tuple[str | int, ...], _Tensor] = {}
        self._values: Leaves = {}

    def add(self, rank: int, leaves: Any, remarks: list[str]) -> None:
        """Take what a rank has saved."""
        for path, leaf in leaves:
            key = (*path[:1], rank, *path[1:]) if self.part == _OWN else (self.part, *path)
            if isinstance(leaf, Located):
                self._put(key, leaf.shape, leaf.dtype, leaf.pieces())
            elif isinstance(leaf, Inert) and is_dtensor(leaf):
                self._part(key, rank, leaf)
            elif _holds_objects(leaf):
                if rank == 0:
                    remarks.append(
                        f"{dotted(path)} of {self.part} is left out: it is no plain value"
                    )
            elif rank == 0:
                self._values[path if self.part == _OWN else key] = leaf

    def _part(self, key: tuple[str | int, ...], rank: int, leaf: Inert) -> None:
        try:
            part = part_of(leaf)
            pieces = part.pieces()
        except CheckpointError as error:
            what = f"{dotted(key)} of rank {rank} cannot be read: {error.what}"
            raise CheckpointError(what, why=error.why) from None
        self.mesh |= part.mesh.axes
        self._put(key, part.shape, part.local.dtype, pieces)

    def _put(
        self, key: tuple[str | int, ...], shape: tuple[int, ...], dtype: torch.dtype, pieces: Pieces
    ) -> None:
        known = self._tensors.setdefault(key, _Tensor(shape, dtype))
        if (known.shape, known.dtype) != (shape, dtype):
            raise CheckpointError(
                f"ranks do not agree on {dotted(key)}",
                why=f"{known.dtype} of {list(known.shape)}, and {dtype} of {list(shape)}",
            )
        known.parts.append(pieces)

    def leaves(self) -> Leaves:
        """What all ranks have saved together."""
        return {**{key: tensor.atom() for key, tensor in self._tensors.items()}, **self._values}


def _holds_objects(leaf: Any) -> bool:
    if isinstance(leaf, list | tuple | set):
        return any(map(_holds_objects, leaf))
    if isinstance(leaf, Mapping):
        return any(map(_holds_objects, leaf.values()))
    return isinstance(leaf, Inert | type)
