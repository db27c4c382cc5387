"""Universal folders as views; what the manifest says is held against the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter

from core.checkpoints.values import decode
from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.files.safetensors import SUFFIX, read_tensors
from core_ucp.layout.rules import Rules
from core_ucp.universal import NAME, Manifest, StoredAtom, StoredFile, head_digest
from core_ucp.view.files import Files
from core_ucp.view.view import Atom, Relation, Resume, View


def detect(path: Path) -> bool:
    """Whether a folder is universal."""
    return (path / NAME).is_file()


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a universal folder.

    Raises:
        CheckpointError: when the manifest or a header is damaged, or a file is missing or is not
            as long as it was.
    """
    manifest = Manifest.read(path)
    for name, stored in manifest.files.items():
        _require_file(path, name, stored)
    found = read_tensors(path, [name for name in manifest.files if name.endswith(SUFFIX)])
    strangers = sorted(found.atoms.keys() - manifest.atoms.keys())
    if strangers:
        raise CheckpointError(f"{path} has {strangers[0]}, of which its manifest does not know")
    atoms = {
        key: _atom(path, key, stored, found.files, found.atoms)
        for key, stored in manifest.atoms.items()
    }
    source = manifest.source
    return View(
        path=path,
        framework="universal",
        files=found.files,
        atoms=atoms,
        aliases=manifest.aliases,
        resume=_resume(path, manifest),
        mesh=source.get("mesh", {}),
        details={
            "converted from": source.get("framework", ""),
            **cast(dict[str, Any], decode(source.get("details", {"dict": {}}), {})),
        },
        remarks=manifest.remarks,
        lossy=manifest.lossy,
        digests={key: stored.digest for key, stored in manifest.atoms.items()},
    )


def _require_file(folder: Path, name: str, stored: StoredFile) -> None:
    """Hold a file's size and its first bytes against the manifest."""
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{name!r} leaves {folder}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", fix="use another copy of the checkpoint")
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(stored.head)
    if size != stored.size:
        raise CheckpointError(f"{path} is {size:,} bytes long", why=f"it had {stored.size:,}")
    if head_digest(head) != stored.blake2b:
        raise CheckpointError(f"the first {stored.head:,} bytes of {path} are not what was written")


def _atom(
    folder: Path, key: str, stored: StoredAtom, files: Files, found: dict[str, Atom] | Any
) -> Atom:
    atom = found.get(key)
    if atom is None:
        raise CheckpointError(f"{folder} lacks {key}", why=f"it should lie in {stored.file}")
    there = (
        files.names[int(atom.pieces.file[0])],
        int(atom.pieces.offset[0]),
        atom.shape,
        str(atom.dtype).removeprefix("torch."),
    )
    if there != (stored.file, stored.offset, stored.shape, stored.dtype):
        raise CheckpointError(
            f"{key} in {folder} is not as its manifest says", why=f"it is {there}"
        )
    return dataclasses.replace(atom, relation=cast(Relation, stored.relation))


def _resume(folder: Path, manifest: Manifest) -> Resume:
    try:
        kinds = get_type_hints(Resume)
        found = {name: decode(value, {}) for name, value in manifest.resume.items()}
        return Resume(**{n: _strictly(kinds[n], value) for n, value in found.items()})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / NAME} is damaged", why=f"resume: {error}") from None


def _strictly(kind: Any, value: Any) -> Any:
    return TypeAdapter(kind).validate_python(value, strict=True)
