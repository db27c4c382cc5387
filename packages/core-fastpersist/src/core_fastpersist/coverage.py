"""Where the digests of a file are: in its header, or in a small file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.disk import disk_errors, replace_file
from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests
from core_fastpersist.direct.room import writing
from core_fastpersist.files.header import METADATA, PREFIX
from core_fastpersist.files.parsing import parse, parse_json, read_header

SUFFIX = ".xxh3.json"
_VERSION = 1
_LARGEST = 256 * 2**20
_KEY = PREFIX + "digests"


def sidecar_of(path: Path) -> Path:
    """The small file with the digests of a file that has no room for them."""
    return path.with_name(path.name + SUFFIX)


def digests_of(path: Path) -> Digests | None:
    """The digests of a file, or ``None`` where it has none.

    Raises:
        CheckpointError: when they, or the header that holds them, are damaged.
    """
    if sidecar_of(path).is_file():
        return _beside(path)
    return _in_header(path) if is_safetensors(path) else None


def is_safetensors(path: Path) -> bool:
    """Whether a file is called so, or begins as one does; ``save`` takes any name."""
    if path.suffix == ".safetensors":
        return True
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        size, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return first == b"{" and 8 + size <= path.stat().st_size


def write_digests(path: Path, digests: Digests) -> None:
    """Write the digests of a file beside it, durably, and at once: a kill leaves all or none.

    Raises:
        CheckpointError: when the disk refuses.
    """
    content = json.dumps({"version": _VERSION, "file": path.name, **digests.as_json()})
    with writing(sidecar_of(path), len(content)):
        replace_file(sidecar_of(path), content.encode())


def _in_header(path: Path) -> Digests | None:
    try:
        return read_header(path).digests
    except CheckpointError:
        longer = _before_the_cut(path)
        if longer is None:
            raise
        return longer


def _before_the_cut(path: Path) -> Digests | None:
    """The digests in a header that is sound, in a file that has not the size it says."""
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _LARGEST))
    try:
        saved = Digests.from_json(parse_json(parse_json(text.decode())[METADATA][_KEY]))
        return parse(text, saved.size).digests
    except (ValueError, KeyError, TypeError, RecursionError, CheckpointError):
        return None


def _beside(path: Path) -> Digests:
    sidecar = sidecar_of(path)
    with disk_errors(f"cannot read {sidecar}"):
        if sidecar.stat().st_size > _LARGEST:
            raise CheckpointError(f"{sidecar} holds no digests", why="it is too large")
        content = sidecar.read_bytes()
    try:
        value: Any = json.loads(content)
        if value["version"] != _VERSION or value["file"] != path.name:
            raise ValueError(f"it is of version {value['version']!r} and of {value['file']!r}")
        return Digests.from_json(value)
    except (ValueError, TypeError, KeyError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{sidecar} is damaged", why=str(error).splitlines()[0]) from None
