"""Universal folders: whole tensors in safetensors files that torch itself loads, and one manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from core.checkpoints.values import encode
from core.errors import CheckpointError
from core_ucp.files.safetensors import SHARD_SIZE, Layout, Place, Tensor, lay_out
from core_ucp.targets.target import Digests, NewFile, Target, Wanted
from core_ucp.universal import Manifest, StoredAtom, StoredFile, head_digest
from core_ucp.view.keys import MODEL, OPTIMIZER
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

_STEMS = {"model": MODEL, "optim": OPTIMIZER, "extra": ""}


@dataclass(frozen=True)
class UniversalOptions:
    """How a universal folder is made.

    Attributes:
        shard_size: bytes of tensors in one file, unless a single tensor is larger.
    """

    shard_size: int = SHARD_SIZE


def build(view: View, options: UniversalOptions | None = None) -> Target:
    """Lay out a universal folder for everything that a view holds.

    Raises:
        CheckpointError: for a tensor that safetensors cannot hold, naming it, or a plain value that
            JSON cannot.
    """
    options = options or UniversalOptions()
    layouts = [
        lay_out(_tensors(view, stem), stem, limit=options.shard_size)
        for stem in _STEMS
        if _tensors(view, stem)
    ]
    files: tuple[NewFile, ...] = ()
    wanted: list[Wanted] = []
    for layout in layouts:
        wanted += _wanted(view, layout, len(files))
        files += layout.files
    places = {each.key: each.atom for each in wanted}

    def finish(folder: Path, digests: Digests) -> None:
        _manifest(view, files, places, digests).write(folder)

    encoded_resume(view)  # refused before anything is written
    return Target(files, tuple(wanted), finish, tuple(view.remarks))


def _tensors(view: View, stem: str) -> list[Tensor]:
    return [
        Tensor(key, atom.dtype, atom.shape)
        for key, atom in view.atoms.items()
        if next(s for s, prefix in _STEMS.items() if key.startswith(prefix)) == stem
    ]


def _wanted(view: View, layout: Layout, first: int) -> list[Wanted]:
    return [
        Wanted(key, _placed(view.atoms[key], place, first)) for key, place in layout.places.items()
    ]


def _placed(atom: Atom, place: Place, first: int) -> Atom:
    file = first + place.file
    pieces = Pieces.dense(atom.shape, file, place.offset, atom.dtype.itemsize)
    return Atom(atom.shape, atom.dtype, pieces, atom.relation)


def _manifest(
    view: View, files: tuple[NewFile, ...], places: Mapping[str, Atom], digests: Digests
) -> Manifest:
    stored = {
        key: StoredAtom(
            files[int(atom.pieces.file[0])].name,
            int(atom.pieces.offset[0]),
            atom.shape,
            dtype_name(atom.dtype),
            atom.relation,
            digests[key],
        )
        for key, atom in places.items()
    }
    return Manifest(
        atoms=stored,
        files={file.name: _stored_file(file) for file in files},
        aliases=dict(view.aliases),
        resume=encoded_resume(view),
        source={
            "framework": view.framework,
            "name": view.path.name,
            "files": {name: view.files.size(i) for i, name in enumerate(view.files.names)},
            "mesh": dict(view.mesh),
            "details": encode(dict(view.details), "details", {}),
        },
        remarks=list(view.remarks),
        lossy=list(view.lossy),
        written_by=f"core-ucp {version('core-ucp')}",
    )


def _stored_file(file: NewFile) -> StoredFile:
    head = b"".join(data for _, data in file.parts)
    return StoredFile(file.size, len(head), head_digest(head))


def encoded_resume(view: View) -> dict[str, Any]:
    """Plain values of a run as JSON.

    Raises:
        CheckpointError: naming a value that JSON cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    fields = dataclasses.fields(view.resume)
    found = {f.name: encode(getattr(view.resume, f.name), f.name, tensors) for f in fields}
    if tensors:
        raise CheckpointError(
            f"{next(iter(tensors))} of {view.path} is a tensor among plain values"
        )
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
