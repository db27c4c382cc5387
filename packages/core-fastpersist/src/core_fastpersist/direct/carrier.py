"""What carries a finished file image to the disk: threads of this process, or another process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from core_fastpersist.direct.digests import Digests
from core_fastpersist.direct.newfile import NewFile, WriteOptions
from core_fastpersist.direct.pieces import Piece


class Carrier(Protocol):
    """Writes whole files."""

    def write(self, path: Path, size: int, pieces: Sequence[Piece]) -> Digests:
        """Write a new file and make it durable; returns when it is.

        Raises:
            CheckpointError: when that failed, wherever; nothing is left at ``path`` then.
        """
        ...

    def close(self) -> None:
        """Free what it holds; it must not be used afterwards."""


class ThreadCarrier:
    """Writes in threads of this process, which wait for the disk without the interpreter's lock."""

    def __init__(self, options: WriteOptions | None = None) -> None:
        self.options = options or WriteOptions()

    def write(self, path: Path, size: int, pieces: Sequence[Piece]) -> Digests:
        with NewFile(path, size, self.options) as file:
            digests = file.write(pieces)
            file.sync()
        return digests

    def close(self) -> None:
        pass
