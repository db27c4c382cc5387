"""Safetensors files: what lies where in existing ones, and the layout of new ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.checkpoints.safetensors import DTYPES, Entry, read_header
from core.errors import CheckpointError
from core.storage import FileSource
from core_ucp.files.new_file import NewFile
from core_ucp.view import pieces as places
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

SUFFIX = ".safetensors"
SHARD_SIZE = 4 * 2**30
"""Bytes of tensors up to which one file is filled."""
_MOST_TENSORS = 100_000
"""Tensors of one file: readers refuse headers of more than 100 MB."""
_SHARDING = "DCP_SHARDING_INFO"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Tensors:
    """What a set of safetensors files holds.

    Attributes:
        files: the files.
        atoms: tensors by name.
        sharded: whether files hold parts of tensors, as DCP's Hugging Face writer leaves them.
    """

    files: Files
    atoms: Mapping[str, Atom]
    sharded: bool


class _Part(NamedTuple):
    file: int
    entry: Entry
    start: tuple[int, ...]


def read_tensors(folder: Path, names: Sequence[str], table: Files | None = None) -> Tensors:
    """Read the headers of safetensors files.

    Args:
        folder: where they are.
        names: of the files.
        table: of the same folder, that the files become part of; a new one unless given.

    Raises:
        CheckpointError: for a damaged header, or a tensor that is there twice.
    """
    files = Files(folder) if table is None else table
    parts: dict[str, list[_Part]] = {}
    sharded = False
    for name in names:
        index = files.add(name)
        path = files.path(index)
        entries, text = _header_of(path)
        offsets = _offsets(path, text.get(_SHARDING))
        sharded |= offsets is not None
        for key, entry in entries.items():
            start = (offsets or {}).get(key, (0,) * len(entry.shape))
            parts.setdefault(key, []).append(_Part(index, entry, start))
    if not sharded:
        _refuse_doubles(files, parts)
    return Tensors(files, {key: _atom(files, key, found) for key, found in parts.items()}, sharded)


def _header_of(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    source = FileSource(path)
    try:
        return read_header(path.name, source)
    finally:
        source.close()


def _refuse_doubles(files: Files, parts: Mapping[str, Sequence[_Part]]) -> None:
    for key, found in parts.items():
        if len(found) > 1:
            first, second = (files.names[part.file] for part in found[:2])
            raise CheckpointError(f"{files.folder} has {key!r} in {first} and {second}")


def _atom(files: Files, key: str, parts: Sequence[_Part]) -> Atom:
    kinds = {(part.entry.dtype, len(part.entry.shape)) for part in parts}
    if len(kinds) > 1:
        raise CheckpointError(f"the parts of {key!r} in {files.folder} do not fit together")
    dtype = parts[0].entry.dtype
    ends = [[a + n for a, n in zip(p.start, p.entry.shape, strict=True)] for p in parts]
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    once: dict[tuple[int, ...], Pieces] = {}
    again: list[Pieces] = []
    # Ranks that hold nothing of a tensor write an empty part of it.
    for part in [part for part in parts if math.prod(part.entry.shape)] or parts[:1]:
        begin, size = part.entry.begin, part.entry.shape
        pieces = Pieces.dense(size, part.file, begin, dtype.itemsize, part.start)
        if part.start in once:
            again.append(pieces)
        else:
            once[part.start] = pieces
    replicas = places.join(again) if again else None
    return Atom(shape, dtype, places.join([*once.values()]), replicas=replicas)


def _offsets(path: Path, text: str | None) -> dict[str, tuple[int, ...]] | None:
    """First index of every part of a tensor, where DCP says that the file holds parts."""
    if text is None:
        return None
    try:
        found = json.loads(text)
        return {key: tuple(map(int, value["saved_offsets"])) for key, value in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header", why=str(error)) from None


class Tensor(NamedTuple):
    """A tensor that goes into a new file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor goes: index among the new files, and byte of its first element."""

    file: int
    offset: int


@dataclass(frozen=True, eq=False)
class Layout:
    """New safetensors files.

    Attributes:
        files: with their headers; the index comes last where there are several.
        places: by tensor.
    """

    files: tuple[NewFile, ...]
    places: Mapping[str, Place]


def lay_out(
    tensors: Iterable[Tensor],
    stem: str = "model",
    *,
    limit: int = SHARD_SIZE,
    header: Mapping[str, str] | None = None,
) -> Layout:
    """Distribute tensors over files as Hugging Face names them.

    One file is called ``model.safetensors``. Several are ``model-00001-of-00002.safetensors``
    and so on, beside ``model.safetensors.index.json``.

    Args:
        tensors: in the order in which files are filled.
        stem: first part of the names.
        limit: bytes of tensors in one file, unless a single tensor is larger.
        header: free text of the headers; ``format: pt`` unless given.

    Raises:
        CheckpointError: for a tensor that the format cannot hold, naming it.
    """
    shards = _shards([_held(tensor) for tensor in tensors], limit)
    text = dict(header) if header is not None else {"format": "pt"}
    count, files = len(shards), []
    found: dict[str, Place] = {}
    for number, shard in enumerate(shards):
        name = f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}{SUFFIX}"
        begin, size = _header(shard, text)
        for tensor, offset in zip(shard, _starts(shard), strict=True):
            if tensor.name in found:
                raise CheckpointError(f"there are two tensors called {tensor.name!r}")
            found[tensor.name] = Place(number, len(begin) + offset)
        files.append(NewFile(name, len(begin) + size, ((0, begin),)))
    if count > 1:
        files.append(_index(stem, shards, files))
    return Layout(tuple(files), found)


def _held(tensor: Tensor) -> Tensor:
    if tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"safetensors cannot hold {tensor.name!r}",
            why=f"it is {tensor.dtype}",
            fix="leave it out, or choose another format",
        )
    if tensor.name == "__metadata__":
        raise CheckpointError("safetensors cannot hold a tensor called '__metadata__'")
    return tensor


def _shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors by file, those with the widest elements first so that all are aligned."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        full = filled + tensor.nbytes > limit or len(shards[-1]) == _MOST_TENSORS
        if full and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _starts(shard: Sequence[Tensor]) -> list[int]:
    """First byte of each tensor behind the header."""
    starts, position = [], 0
    for tensor in shard:
        starts.append(position)
        position += tensor.nbytes
    return starts


def _header(shard: Sequence[Tensor], text: Mapping[str, str]) -> tuple[bytes, int]:
    """The first bytes of a file, and the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": dict(text)}
    size = 0
    for tensor, begin in zip(shard, _starts(shard), strict=True):
        size = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, size],
        }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content, size


def _index(stem: str, shards: Sequence[Sequence[Tensor]], files: Sequence[NewFile]) -> NewFile:
    """The file that says which tensor is in which file."""
    pairs = [(tensor, file) for shard, file in zip(shards, files, strict=True) for tensor in shard]
    content = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in pairs)},
        "weight_map": {t.name: f.name for t, f in sorted(pairs, key=lambda pair: pair[0].name)},
    }
    text = json.dumps(content, indent=2).encode()
    return NewFile(f"{stem}{SUFFIX}.index.json", len(text), ((0, text),))
