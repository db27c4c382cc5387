"""Choices that have been measured, in memory and in a file under the user's cache directory."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from core.disk import replace_file
from core.errors import CheckpointError
from core.triton import triton
from core_fp6.kernels.gpu.configs import Config, bucket

Choice = Config | Literal["library"]
LIBRARY: Final = "library"
"""Decode to memory and multiply by the vendor's library."""

VERSION: Final = 1
MOST_ENTRIES: Final = 4096
MOST_BYTES: Final = 2**20


@dataclass(frozen=True)
class Key:
    """What a choice was measured for; numbers of tokens by their bucket."""

    device: str
    rows: int
    columns: int
    tokens: int
    dtype: str
    scheme: str

    @classmethod
    def of(
        cls,
        device: str,
        tokens: int,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        scheme: str,
        fp8: bool = False,
    ) -> Key:
        """The key of a product of ``[tokens, columns]`` and ``[rows, columns]``."""
        name = "float8_e4m3fn" if fp8 else str(dtype).removeprefix("torch.")
        return cls(device, rows, columns, bucket(tokens), name, scheme)

    def __str__(self) -> str:
        return "|".join(map(str, asdict(self).values()))


def path() -> Path:
    """The file: ``core-fp6/gpu.json`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "core-fp6" / "gpu.json"


def chosen(key: Key) -> Choice | None:
    """The choice for a key, or None where nothing has been measured."""
    return entries().get(str(key))


@functools.cache
def entries() -> dict[str, Choice]:
    """All choices of this process; those of the file to begin with.

    A file that cannot be right is reported and left alone: products do not depend on it.
    """
    try:
        return read(path())
    except (ValueError, OSError) as error:
        warnings.warn(f"{path()} is ignored: {error}; remove it and tune again", stacklevel=2)
        return {}


def read(file: Path) -> dict[str, Choice]:
    """Choices of a file; none where there is no file or another version of Triton wrote it.

    Raises:
        ValueError: for a file that :func:`write` has not written.
        OSError: when the disk refuses.
    """
    if not file.exists():
        return {}
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        raise ValueError("it has no entries")
    if content.get("version") != VERSION or content.get("triton") != triton.__version__:
        return {}
    found: dict[str, Any] = content["entries"]
    if len(found) > MOST_ENTRIES:
        raise ValueError(f"it has more than {MOST_ENTRIES} entries")
    return {key: _parsed(value) for key, value in found.items()}


def write(file: Path, choices: dict[str, Choice]) -> None:
    """Replace a file at once; the latest entries are kept where there are too many.

    Raises:
        CheckpointError: when the disk refuses.
    """
    kept = list(choices.items())[-MOST_ENTRIES:]
    plain = {key: asdict(v) if isinstance(v, Config) else v for key, v in kept}
    content = {"version": VERSION, "triton": triton.__version__, "entries": plain}
    replace_file(file, json.dumps(content, indent=1).encode())


def keep(measured: dict[str, Choice], *, to_disk: bool) -> None:
    """Use choices from now on, and in later processes where ``to_disk`` is true."""
    entries().update(measured)
    if not to_disk:
        return
    try:
        # Another process may have measured something else meanwhile.
        write(path(), {**read(path()), **measured})
    except (CheckpointError, ValueError, OSError) as error:
        warnings.warn(f"what was tuned is lost when this process ends: {error}", stacklevel=2)


def _parsed(value: Any) -> Choice:
    if value == LIBRARY:
        return LIBRARY
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise ValueError(f"{value!r} is no choice")
    try:
        return Config(**value)
    except TypeError as error:
        raise ValueError(f"{value!r} is no choice") from error
