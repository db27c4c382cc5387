"""What a file or a checkpoint says of itself: headers and metadata, no tensor and no pickle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from core.checkpoints.dcp import DcpReader
from core.checkpoints.layout import MANIFEST, Manifest, steps
from core.errors import CheckpointError
from core_fastpersist.coverage import SUFFIX, digests_of, is_safetensors
from core_fastpersist.direct.digests import Digests
from core_fastpersist.files.header import PREFIX
from core_fastpersist.files.loading import FileInfo, inspect_file

_ALIGNED = 4096


def inspect(path: Path) -> dict[str, Any]:
    """Describe what is at ``path``.

    Args:
        path: a safetensors or ``.pt`` file, a checkpoint, or a folder of checkpoints ``step-*``.

    Returns:
        a JSON object. What it has depends on the kind: ``header``, ``tree``, ``tensors``,
        ``metadata``, ``digests`` of a file; ``manifest``, ``files``, ``tensors`` of a folder.

    Raises:
        CheckpointError: when it is damaged, or nothing that is known.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        return _folder(path)
    if is_safetensors(path):
        return _safetensors(path)
    from core_fastpersist.inspection_pt import describe, is_pt

    if is_pt(path):
        return describe(path)
    raise CheckpointError(f"{path} is of no known kind", why="neither safetensors nor .pt")


def _folder(path: Path) -> dict[str, Any]:
    if (path / ".metadata").is_file():
        return _dcp(path)
    if (path / MANIFEST).is_file() or any(path.glob("*.safetensors")):
        return _several(path)
    for folder in (path, path / "checkpoints"):
        if steps(folder):
            return _checkpoints(folder)
    raise CheckpointError(f"{path} holds no checkpoint", fix="name a file or a step-* folder")


def _safetensors(path: Path) -> dict[str, Any]:
    found = inspect_file(path)
    return {
        "file": str(path),
        "header": {
            "kind": "safetensors",
            "by core-fastpersist": found.ours,
            "bytes": found.size,
            "data from byte": found.start,
            "alignment of the data": found.alignment,
            "tensors": len(found.tensors),
        },
        "tree": found.tree,
        "tensors": _entries(found),
        "metadata": _metadata(found.metadata),
        "digests": _digests(found.digests),
    }


def _entries(found: FileInfo) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.end - tensor.begin,
            "offset": tensor.begin,
            "alignment": alignment(tensor.begin),
        }
        for tensor in found.tensors
    ]


def _metadata(strings: Mapping[str, str]) -> dict[str, str]:
    """What others wrote beside our own keys, which are shown elsewhere."""
    return {key: text for key, text in strings.items() if not key.startswith(PREFIX)}


def _digests(digests: Digests | None) -> dict[str, Any]:
    if digests is None:
        return {}
    return {
        "algorithm": "xxh3_128",
        "bytes of a chunk": digests.chunk,
        "chunks": len(digests.hashes),
        "from byte": digests.start,
    }


def alignment(offset: int) -> int:
    """Largest power of two, up to 4096, that divides a file offset.

    Example:
        >>> [alignment(offset) for offset in (0, 24, 4096, 12288)]
        [4096, 8, 4096, 4096]
    """
    return min(offset & -offset, _ALIGNED) if offset else _ALIGNED


def _several(folder: Path) -> dict[str, Any]:
    """A folder of safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    rows = [{"file": path.name, **row} for path in files for row in _entries(inspect_file(path))]
    return {
        "folder": str(folder),
        "manifest": _manifest(folder),
        "files": _files(folder, Counter(row["file"] for row in rows)),
        "tensors": rows,
    }


def _dcp(folder: Path) -> dict[str, Any]:
    metadata = DcpReader(folder).read_metadata()
    places: Mapping[Any, Any] = metadata.storage_data or {}
    items = Counter(place.relative_path for place in places.values())
    return {
        "folder": str(folder),
        "manifest": _manifest(folder),
        "files": _files(folder, items),
        "tensors": [_row(name, metadata) for name in metadata.state_dict_metadata],
        "items": [
            {
                "name": index.fqn,
                "chunk at": list(index.offset or ()),
                "file": place.relative_path,
                "offset": place.offset,
                "bytes": place.length,
            }
            for index, place in places.items()
        ],
    }


def _row(name: str, metadata: Metadata) -> dict[str, Any]:
    entry = metadata.state_dict_metadata[name]
    if not isinstance(entry, TensorStorageMetadata):
        return {"name": name, "dtype": "object", "shape": [], "bytes": 0, "chunks": 1}
    dtype = entry.properties.dtype
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(entry.size),
        "bytes": entry.size.numel() * dtype.itemsize,
        "chunks": len(entry.chunks),
    }


def _files(folder: Path, items: Counter[str]) -> list[dict[str, Any]]:
    """Files of a checkpoint, without the digests beside them."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(SUFFIX):
            digests = digests_of(path)
            found.append(
                {
                    "file": path.name,
                    "bytes": path.stat().st_size,
                    "items": items[path.name],
                    "digests": len(digests.hashes) if digests else 0,
                    "bytes of a chunk": digests.chunk if digests else 0,
                }
            )
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = Manifest.read(folder)
    return {
        "step": manifest.step,
        "format": manifest.format,
        "ranks": manifest.world_size,
        "values": json.dumps(manifest.values),
    }


def _checkpoints(folder: Path) -> dict[str, Any]:
    """The checkpoints of a run, newest first."""
    rows = []
    for step, path in steps(folder):
        row: dict[str, Any] = {"step": step, "folder": path.name}
        try:
            manifest = Manifest.read(path)
            size = sum(manifest.files.values())
            row |= {"format": manifest.format, "ranks": manifest.world_size, "bytes": size}
            row["state"] = "whole"
        except CheckpointError as error:
            row |= {"format": "", "ranks": 0, "bytes": 0, "state": str(error).splitlines()[0]}
        rows.append(row)
    return {"folder": str(folder), "checkpoints": rows}
