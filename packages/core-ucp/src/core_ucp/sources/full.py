"""Files of ``torch.save`` that hold a whole state: a bare state dict, or one of a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core_ucp.files.archives import holds_mapping, read_archive
from core_ucp.files.pickles import Inert
from core_ucp.files.texts import read_weight_map
from core_ucp.files.trees import Leaves, atoms_of, dotted, walk
from core_ucp.sources.relations import tied
from core_ucp.sources.sections import arrange
from core_ucp.view.files import Files
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
INERT = (
    "argparse.Namespace",
    "datetime.*",
    "enum.*",
    "numpy.*",
    "omegaconf.*",
    "pathlib.*",
    "transformers.*",
    "types.SimpleNamespace",
)
"""Classes that often lie beside tensors. They come out inert, and are left out with a remark."""


def detect(path: Path) -> bool:
    """Whether a path is a saved dictionary, or a folder with the old files of Hugging Face."""
    if path.is_dir():
        trainers = ("optimizer.bin", "optimizer.pt", "random_states_0.pkl")
        known = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
        return known and not any((path / name).exists() for name in trainers)
    return holds_mapping(path)


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open a file of ``torch.save``, or a folder of ``pytorch_model*.bin``.

    Parameters that an optimizer knows by number are named by the order of the model's state.

    Args:
        path: file or folder.
        rules: not needed, the tensors are whole.

    Raises:
        CheckpointError: for a file that is damaged or wants to run code, a missing file, and an
            optimizer whose numbers cannot be named.
    """
    files = Files(path if path.is_dir() else path.parent)
    names = bin_files(path) if path.is_dir() else [path.name]
    leaves: Leaves = {}
    remarks: list[str] = []
    for name in names:
        found, more = read_leaves(files, name)
        leaves |= found
        remarks += more
    arranged = arrange(files, leaves, weights=path.is_dir())
    atoms, aliases = tied(arranged.atoms)
    view = View(
        path=path,
        framework="torch",
        files=files,
        atoms=atoms,
        aliases=aliases,
        resume=arranged.resume,
        remarks=(*remarks, *arranged.remarks),
    )
    if not atoms:
        raise CheckpointError(f"{path} holds no tensors")
    view.prove()
    return view


def bin_files(folder: Path) -> list[str]:
    """The files of the weights in a folder of Hugging Face without safetensors.

    Raises:
        CheckpointError: when one is missing, naming it.
    """
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    names = sorted({*read_weight_map(index).values()})
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing", why=f"{INDEX} names it")
    return names


def read_leaves(files: Files, name: str, root: tuple[str, ...] = ()) -> tuple[Leaves, list[str]]:
    """The tensors and plain values of a file, and what is left out.

    Args:
        files: the table that the file becomes part of.
        name: of the file.
        root: where its content belongs.

    Raises:
        CheckpointError: for a file that is damaged or wants to run code.
    """
    tree = atoms_of(read_archive(files, name, INERT))
    leaves: Leaves = {}
    remarks: list[str] = []
    for path, leaf in walk(tree, root):
        if _plain(leaf):
            leaves[path] = leaf
        else:
            kind = leaf.kind if isinstance(leaf, Inert) else type(leaf).__name__
            remarks.append(f"{dotted(path) or name} in {name} is left out: it is a {kind}")
    return leaves, remarks


def _plain(leaf: Any) -> bool:
    """Whether a leaf is no object, and holds none."""
    if isinstance(leaf, list | tuple | set):
        return all(map(_plain, leaf))
    return not isinstance(leaf, Inert | type) and not isinstance(leaf, Mapping)
