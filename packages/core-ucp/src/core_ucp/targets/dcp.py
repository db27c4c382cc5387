"""DCP folders that stock ``dcp.load`` reads, into any number of ranks."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] # stock readers unpickle this class
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from core.errors import CheckpointError
from core_ucp.files.metadata import METADATA
from core_ucp.files.new_archives import Archive, new_archive
from core_ucp.files.new_pickles import Room
from core_ucp.files.trees import Path, dotted, walk
from core_ucp.targets.target import NewFile, Target, Wanted
from core_ucp.view.keys import EXTRA, OPTIMIZER, parse_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, Resume, View

_ALIGNMENT = 64
_FLATTENED = "param_groups"


@dataclass(frozen=True)
class DcpOptions:
    """How a DCP folder is made.

    Attributes:
        limit: bytes up to which one file is filled, unless a single tensor is larger.
    """

    limit: int = 4 * 2**30


def build(view: View, options: DcpOptions | None = None) -> Target:
    """Lay out a DCP folder.

    Its state is ``{"model": ..., "optim": ...}`` as
    :func:`torch.distributed.checkpoint.state_dict.get_state_dict` returns it. The groups of the
    optimizer are there by number and by name, so that both of torch's forms of the optimizer's
    state find what they look for. Checksums of zip entries are left out, as torch allows.

    Args:
        view: the source.
        options: sizes.

    Raises:
        CheckpointError: for a key that two tensors would have.
    """
    folder = Folder((options or DcpOptions()).limit)
    for key, atom in view.atoms.items():
        folder.tensor(key, _path(key), atom)
    for alias, owner in view.aliases.items():
        atom = view.atoms[weight_key(owner)]
        folder.tensor(weight_key(owner), _path(weight_key(alias)), atom)
    remarks: list[str] = []
    for path, value in _values(view.resume):
        try:
            folder.value(path, value)
        except CheckpointError as error:
            remarks.append(f"{dotted(path)} is left out: {error.what}")
    return Target(
        (*folder.close(), folder.metadata()), tuple(folder.wanted), remarks=tuple(remarks)
    )


def _path(key: str) -> Path:
    """Where a tensor stands in the nested state."""
    part = parse_key(key)
    if part is None:
        return (key.removeprefix(EXTRA),)
    if part.state:
        return (*OPTIMIZER.rstrip(".").split("."), part.parameter, part.state)
    return ("model", part.parameter)


def _values(resume: Resume) -> Iterator[tuple[Path, Any]]:
    """The plain values of a run, by their places in the nested state."""
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for name, hyper in resume.hyper.items():
        for key, value in hyper.items():
            yield ("optim", f"{_FLATTENED}.{name}.{key}"), value
        members = next((names for known, names in groups if known == hyper), None)
        if members is None:
            groups.append((hyper, [name]))
        else:
            members.append(name)
    for index, (hyper, names) in enumerate(groups):
        for key, value in {**hyper, "params": names}.items():
            yield ("optim", _FLATTENED, index, key), value
    if resume.step is not None and "step" not in resume.client:
        yield ("step",), resume.step
    sections = {
        "lr_scheduler": resume.scheduler,
        "scaler": resume.scaler,
        "counters": resume.counters,
    }
    yield from walk({name: values for name, values in sections.items() if values})
    yield from walk(resume.client)


@dataclass
class Folder:
    """A DCP folder whose files are filled one behind the other.

    Attributes:
        limit: bytes up to which one file is filled, unless a single tensor is larger.
        inside: of the target folder, where it is; empty, or ending in ``/``.
        wanted: where atoms go.
    """

    limit: int
    inside: str = ""
    wanted: list[Wanted] = field(default_factory=list)
    _files: list[NewFile] = field(default_factory=list)
    _parts: list[tuple[int, bytes]] = field(default_factory=list)
    _position: int = 0
    _entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    _paths: dict[str, Path] = field(default_factory=dict)
    _data: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    _archives: dict[tuple[torch.dtype, tuple[int, ...]], tuple[Archive, int]] = field(
        default_factory=dict
    )

    def tensor(
        self, source: str, path: Path, atom: Atom, shape: tuple[int, ...] | None = None
    ) -> None:
        """Make room for a tensor as one chunk.

        Args:
            source: key of the atom.
            path: where the tensor stands in the nested state.
            atom: shape and dtype that it is wanted in.
            shape: of the tensor with rows of padding, which are zero; the atom's unless given.
        """
        stored = atom.shape if shape is None else shape
        archive, first = self._archive(atom.dtype, stored)
        start = torch.Size([0] * len(stored))
        chunk = ChunkStorageMetadata(start, torch.Size(stored))
        entry = TensorStorageMetadata(TensorProperties(atom.dtype), chunk.sizes, [chunk])
        offset = self._add(path, entry, archive, start) + first
        pieces = Pieces.dense(atom.shape, len(self._files), offset, atom.dtype.itemsize)
        place = Atom(atom.shape, atom.dtype, pieces, atom.relation)
        self.wanted.append(Wanted(source, place))

    def _archive(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Archive, int]:
        """The archive of a tensor, and the byte of its first element; the same for all alike."""
        if (dtype, shape) not in self._archives:
            room = Room(dtype, shape)
            archive = new_archive("", room)
            self._archives[dtype, shape] = archive, archive.places[room]
        return self._archives[dtype, shape]

    def value(self, path: Path, value: Any) -> None:
        """Add a plain value."""
        self._add(path, BytesStorageMetadata(), new_archive("", value), None)

    def _add(
        self,
        path: Path,
        entry: TensorStorageMetadata | BytesStorageMetadata,
        archive: Archive,
        start: torch.Size | None,
    ) -> int:
        """Append an archive, and return its first byte in the present file."""
        key, size = dotted(path), archive.file.size
        if key in self._entries:
            raise CheckpointError(f"two entries would be called {key}")
        if self._position and self._position + size > self.limit:
            self._close()
        padding = -self._position % _ALIGNMENT
        self._parts.append((self._position, bytes(padding)))
        begin = self._position + padding
        self._parts += [(begin + offset, data) for offset, data in archive.file.parts]
        self._position = begin + size
        self._entries[key], self._paths[key] = entry, path
        name = self._name()
        self._data[MetadataIndex(key, start)] = _StorageInfo(name, begin, size)
        return begin

    def _name(self) -> str:
        return f"__0_{len(self._files)}{DEFAULT_SUFFIX}"

    def _close(self) -> None:
        name = self.inside + self._name()
        self._files.append(NewFile(name, self._position, _merged(self._parts)))
        self._parts, self._position = [], 0

    def close(self) -> tuple[NewFile, ...]:
        """All files of tensors and values."""
        if self._position:
            self._close()
        return tuple(self._files)

    def metadata(self) -> NewFile:
        """The file that stock readers look for."""
        content = Metadata(
            state_dict_metadata=dict(self._entries),
            planner_data=self._paths,
            storage_data=self._data,
            storage_meta=StorageMeta(),
        )
        data = pickle.dumps(content)
        return NewFile(self.inside + METADATA, len(data), ((0, data),))


def _merged(parts: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """The same parts, those in one that follow each other."""
    found: list[tuple[int, bytearray]] = []
    for offset, data in parts:
        if found and found[-1][0] + len(found[-1][1]) == offset:
            found[-1][1].extend(data)
        else:
            found.append((offset, bytearray(data)))
    return tuple((offset, bytes(data)) for offset, data in found if data)
