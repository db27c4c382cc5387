"""A Hugging Face folder that is read: its configuration, and its tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from core.checkpoints.safetensors import Entry, read_header
from core.disk import disk_errors, plain_name
from core.errors import CheckpointError
from core.storage import FileSource

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 256 * 2**20


class Source:
    """Tensors and configuration of a folder as ``save_pretrained`` writes it.

    Every header is read and held against its file before a tensor is; files are opened when they
    are needed, and closed by :meth:`close` or at the end of a ``with`` block.

    Args:
        path: the folder.

    Raises:
        CheckpointError: when it is no such folder, or a file is missing, truncated or says what
            cannot be true.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            state = "is no folder" if path.exists() else "does not exist"
            raise CheckpointError(
                f"{path} {state}", fix="name a folder with config.json and weights"
            )
        self.path = path
        self.entries = _entries(path)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.clear()
        self._open.close()

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``."""
        return read_json(self.path / CONFIG)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.size, self.entries))

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        entry = self.entries[name]
        return entry.end - entry.begin

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which they lie in the files."""
        return sorted(self.entries, key=lambda n: (self.entries[n].file, self.entries[n].begin))

    def tensor(self, name: str) -> Tensor:
        """A tensor of a name in :attr:`entries`, in the memory of the file.

        Raises:
            CheckpointError: when it cannot be read.
        """
        file = self.entries[name].file
        path = self.path / file
        try:
            if file not in self._files:
                with disk_errors(f"cannot read {path}"):
                    self._files[file] = self._open.enter_context(safe_open(path, "pt"))
            tensor: Tensor = self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name} of {path}", why=str(error)) from error
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: when there is none, or something else.
    """
    with disk_errors(f"cannot read {path}"):
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is too large", why=f"over {_LARGEST_JSON:,} bytes")
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged", why="it holds no JSON object")
    return content


def _entries(path: Path) -> dict[str, Entry]:
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / SINGLE).is_file():
        return _headers(path, [SINGLE])[SINGLE]
    raise CheckpointError(
        f"{path} has neither {INDEX} nor {SINGLE}",
        fix="save the model with save_pretrained, which writes safetensors",
    )


def _indexed(path: Path) -> dict[str, Entry]:
    """The tensors that the index names, found in the files where it says they are."""
    weights = read_json(path / INDEX).get("weight_map")
    if not isinstance(weights, Mapping) or not all(isinstance(f, str) for f in weights.values()):
        raise CheckpointError(f"{path / INDEX} is damaged", why="it has no weight_map of names")
    files = sorted({plain_name(file) for file in weights.values()})
    headers = _headers(path, files)
    for name, file in weights.items():
        if name not in headers[file]:
            raise CheckpointError(f"{path / file} does not hold {name}", why=f"{INDEX} says so")
    return {name: headers[file][name] for name, file in weights.items()}


def _headers(path: Path, files: list[str]) -> dict[str, dict[str, Entry]]:
    source = FileSource(path)
    try:
        return {file: read_header(file, source)[0] for file in files}
    finally:
        source.close()
