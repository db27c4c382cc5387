"""Text files beside tensors: indices, notes, configurations. They are small, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.disk import disk_errors, plain_name
from core.errors import CheckpointError

_LARGEST = 2**28


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        CheckpointError: when it cannot be read, or is not small.
    """
    with disk_errors(f"cannot read {path}"):
        size = path.stat().st_size
        if size > _LARGEST:
            raise CheckpointError(f"{path} is no text", why=f"it has {size:,} bytes")
        return path.read_bytes()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: when it cannot be read, or is damaged.
    """
    text = read_bytes(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None


def read_weight_map(index: Path) -> dict[str, str]:
    """Names of files by tensor, from an index of Hugging Face.

    Raises:
        CheckpointError: when it is damaged, or names a file outside of its folder.
    """
    found = read_json(index)
    try:
        return {str(key): plain_name(str(name)) for key, name in found["weight_map"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged", why=f"its weight_map: {error!r}") from None


def read_note(path: Path) -> str:
    """The one word of a file in which a run notes what it has saved last.

    Raises:
        CheckpointError: when it cannot be read.
    """
    return read_bytes(path).decode(errors="replace").strip()
