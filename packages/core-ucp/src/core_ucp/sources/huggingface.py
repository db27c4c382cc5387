"""Safetensors files and folders: weights as Hugging Face keeps them, and what else lies in some.

Beside the folders of ``save_pretrained`` these are the files of DCP's Hugging Face writer, where
every rank has left its parts, and the safetensors format of core.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoints.layout import MANIFEST, Manifest
from core.errors import CheckpointError
from core_ucp.files.safetensors import SUFFIX, Tensors, read_tensors
from core_ucp.files.texts import read_weight_map
from core_ucp.files.trees import Leaves
from core_ucp.sources.dcp import manifest_values
from core_ucp.sources.sections import arrange
from core_ucp.universal import NAME as UNIVERSAL
from core_ucp.view.files import Files
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

_INDEX = f"*{SUFFIX}.index.json"
_NUMBERED = re.compile(r"(?P<stem>.*?)-?(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_RANK = re.compile(r"shard-(?P<rank>\d{5})-.*")


def detect(path: Path) -> bool:
    """Whether a path is a safetensors file, or a folder of such files and of no trainer's."""
    if path.is_file():
        return path.suffix == SUFFIX
    trainers = ("optimizer.bin", "optimizer.pt", "random_states_0.pkl", UNIVERSAL)
    return any(path.glob(f"*{SUFFIX}")) and not any((path / name).exists() for name in trainers)


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a safetensors file, or a folder with or without an index.

    Args:
        path: file or folder.
        rules: not needed, the files hold whole tensors or say which parts they hold.

    Raises:
        CheckpointError: for a damaged file, and one that is missing, naming it.
    """
    files = Files(path.parent if path.is_file() else path)
    found, remarks = open_tensors(path, files)
    manifest = Manifest.read(path) if (path / MANIFEST).is_file() else None
    leaves: Leaves = {(key,): atom for key, atom in found.atoms.items()}
    if manifest is not None:
        leaves |= manifest_values(manifest)
    arranged = arrange(
        found.files,
        leaves,
        named=manifest is not None,
        weights=manifest is None,
        step=manifest.step if manifest else None,
    )
    view = View(
        path=path,
        framework="core" if manifest else "huggingface",
        files=found.files,
        atoms=arranged.atoms,
        resume=arranged.resume,
        details={"files": len(found.files), "sharded": found.sharded},
        remarks=(*remarks, *arranged.remarks),
    )
    view.prove()
    return view


def open_tensors(path: Path, files: Files) -> tuple[Tensors, list[str]]:
    """The tensors of a file or a folder, and what a user should know.

    Args:
        path: of the file or the folder.
        files: the table of its folder.

    Raises:
        CheckpointError: for a damaged file, and one that is missing, naming it.
    """
    if path.is_file():
        return read_tensors(path.parent, [path.name], files), []
    present = sorted(found.name for found in path.glob(f"*{SUFFIX}"))
    index = sorted(path.glob(_INDEX))
    if len(index) > 1:
        names = ", ".join(found.name for found in index)
        raise CheckpointError(f"{path} has several indices: {names}", fix="remove all but one")
    if index:
        return _indexed(index[0], present, files)
    if not present:
        raise CheckpointError(f"{path} has no safetensors file")
    _require_all(path, present)
    found = read_tensors(path, present, files)
    remarks = []
    if found.sharded:
        remarks.append("the files do not say how many ranks wrote them: a missing last one hides")
    return found, remarks


def _indexed(index: Path, present: list[str], files: Files) -> tuple[Tensors, list[str]]:
    """The tensors that an index names, in the files where it says they are."""
    weights = read_weight_map(index)
    wanted = sorted({*weights.values()})
    missing = [name for name in wanted if name not in present]
    if missing:
        lost = sorted(key for key, name in weights.items() if name == missing[0])
        raise CheckpointError(
            f"{index.parent / missing[0]} is missing",
            why=f"{index.name} says that it holds {lost[0]} and {len(lost) - 1} more",
            fix="fetch the file, or the whole folder again",
        )
    found = read_tensors(index.parent, wanted, files)
    for key, name in weights.items():
        atom = found.atoms.get(key)
        if atom is None or found.files.names[int(atom.pieces.file[0])] != name:
            raise CheckpointError(f"{index.parent / name} does not hold {key}", why=index.name)
    stale = [name for name in present if name not in wanted]
    remarks = [f"{', '.join(stale)}: not in {index.name}, and left out"] if stale else []
    unknown = sorted(found.atoms.keys() - weights.keys())
    if unknown:
        remarks.append(f"{index.name} does not name {', '.join(unknown[:5])}, which are there")
    return found, remarks


def _require_all(path: Path, present: list[str]) -> None:
    """Make sure that no file of a numbered row is missing.

    Raises:
        CheckpointError: naming the first one.
    """
    known = {*present}
    for name in present:
        match = _NUMBERED.fullmatch(name)
        rank = _RANK.fullmatch(name)
        row = [name]
        if rank:
            row = [f"shard-{n:05}{name[11:]}" for n in range(1, int(rank["rank"]) + 1)]
        elif match and 0 < int(match["count"]) <= 100_000:
            start, _, _ = name.rpartition(f"{match['number']}-of-")
            count = match["count"]
            row = [f"{start}{n:05}-of-{count}{SUFFIX}" for n in range(1, int(count) + 1)]
        missing = next((wanted for wanted in row if wanted not in known), None)
        if missing:
            raise CheckpointError(
                f"{path / missing} is missing",
                why=f"{name} is of the same row",
                fix="fetch the file, or the whole folder again",
            )
