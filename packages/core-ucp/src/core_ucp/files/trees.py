"""Nested states as leaves: the tensors and plain values that a program saved, and their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from core.errors import CheckpointError
from core_ucp.files.pickles import Inert, Located
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

Path = tuple[str | int, ...]
"""Keys of the dictionaries and indices of the lists that lead to a leaf."""
Leaves = dict[Path, Any]
"""Atoms and plain values by path."""


def dotted(path: Path) -> str:
    """The key that DCP gives to a leaf."""
    return ".".join(map(str, path))


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a nested state; lists of plain values are leaves, as DCP has it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*path, key if isinstance(key, int) else str(key)))
    elif isinstance(value, list | tuple) and any(map(_deep, value)):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))
    else:
        yield path, value


def _deep(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_deep, value))
    return isinstance(value, Atom | Located | Inert | Mapping)


def nest(leaves: Iterable[tuple[Path, Any]]) -> Any:
    """The nested state that leaves come from."""
    root: dict[str | int, Any] = {}
    for path, value in leaves:
        if not path:
            return value
        inner = root
        for key in path[:-1]:
            below = inner.setdefault(key, {})
            if not isinstance(below, dict):
                raise CheckpointError(f"{dotted(path)!r} lies inside of a plain value")
            inner = below
        inner[path[-1]] = value
    return _lists(root)


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(below) for key, below in value.items()}
    if inner and list(inner) == list(range(len(inner))):
        return list(inner.values())
    return inner


def number(files: Files, atom: Atom) -> int | float:
    """The one element of an atom.

    Raises:
        CheckpointError: when it has another number of elements, or is complex.
    """
    if atom.numel != 1 or atom.dtype.is_complex or len(atom.pieces) != 1:
        raise CheckpointError(f"a tensor of {list(atom.shape)} is no number")
    buffer = bytearray(atom.dtype.itemsize)
    files.read_into(int(atom.pieces.file[0]), int(atom.pieces.offset[0]), memoryview(buffer))
    found: int | float = torch.frombuffer(buffer, dtype=atom.dtype)[0].item()
    return found


def atoms_of(value: Any, file: int | None = None, offset: int = 0) -> Any:
    """The same nested value with atoms in the place of located tensors.

    Args:
        value: from an archive.
        file: that the archive is a part of; its own unless given.
        offset: first byte of the archive in that file.
    """
    match value:
        case Located():
            atom = value.atom()
            if file is None:
                return atom
            old = atom.pieces
            moved = Pieces(old.boxes, old.file * 0 + file, old.offset + offset, old.stride)
            return dataclasses.replace(atom, pieces=moved)
        case dict():
            return {key: atoms_of(inner, file, offset) for key, inner in value.items()}
        case list():
            return [atoms_of(inner, file, offset) for inner in value]
        case tuple() if any(isinstance(inner, Located | dict | list | tuple) for inner in value):
            return tuple(atoms_of(inner, file, offset) for inner in value)
        case _:
            return value
