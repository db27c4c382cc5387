"""Folders of ``torch.distributed.checkpoint``: FSDP2, tensor-parallel, plain, and core's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoints.layout import MANIFEST, Manifest
from core.checkpoints.values import decode
from core.errors import CheckpointError
from core_ucp.files.distcp import Objects, Stored, read_stored
from core_ucp.files.metadata import METADATA
from core_ucp.files.trees import Leaves, walk
from core_ucp.sources.sections import arrange
from core_ucp.view.keys import EXTRA
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules


def detect(path: Path) -> bool:
    """Whether a folder was written by DCP itself, and not by Megatron with its help."""
    return (path / METADATA).is_file() and not (path / "metadata.json").is_file()


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a DCP folder.

    Weights and optimizer states get the names of :mod:`core_ucp.view.keys` whatever the parts of
    the saved state were called. Pickled entries are read where they hold plain values, and else
    left out with a remark.

    Args:
        path: folder with ``.metadata``.
        rules: not needed, tensors of DCP describe themselves.

    Raises:
        CheckpointError: for metadata that wants to run code, a truncated file, and elements that
            no file holds, naming them.
    """
    stored = read_stored(path)
    leaves, remarks = _leaves(stored)
    manifest = Manifest.read(path) if (path / MANIFEST).is_file() else None
    if manifest is not None:
        leaves |= manifest_values(manifest)
    step = manifest.step if manifest else None
    found = arrange(
        stored.files, leaves, named=manifest is not None, ordered=bool(stored.paths), step=step
    )
    view = View(
        path=path,
        framework="core" if manifest else "dcp",
        files=stored.files,
        atoms=found.atoms,
        resume=found.resume,
        mesh={"ranks": manifest.world_size} if manifest else {},
        details={"files": len(stored.files)},
        remarks=(*remarks, *_stale(path, stored), *found.remarks),
    )
    view.prove()
    return view


def _stale(path: Path, stored: Stored) -> list[str]:
    """Say which files are of another checkpoint, such as one of more ranks."""
    known = {*stored.files.names}
    others = sorted(file.name for file in path.glob("*.distcp") if file.name not in known)
    return [f"{', '.join(others[:5])}: of no use to {METADATA}, and left out"] if others else []


def _leaves(stored: Stored) -> tuple[Leaves, list[str]]:
    """All entries, in the order that the saved state had.

    Ranks share out what they all have, so the order of DCP's own table is another one.
    """
    leaves: Leaves = {}
    remarks: list[str] = []
    objects = Objects(stored.files)
    known = [key for key in stored.paths if key in stored.tensors or key in stored.objects]
    for key in dict.fromkeys([*known, *stored.tensors, *stored.objects]):
        path = stored.paths.get(key, (key,))
        if key in stored.tensors:
            leaves[path] = stored.tensors[key]
            continue
        try:
            leaves |= walk(objects.read(key, stored.objects[key]), path)
        except CheckpointError as error:
            remarks.append(f"{key} is left out: {error.what}")
    return leaves, remarks


class _References(Mapping[str, Any]):
    """Stands for the tensors among plain values: each is an atom of its own."""

    def __getitem__(self, key: str) -> Any:
        return {"tensor": EXTRA + key}

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def manifest_values(manifest: Manifest) -> Leaves:
    """The plain values of a checkpoint that core has written."""
    return {(key,): decode(value, _References()) for key, value in manifest.values.items()}
