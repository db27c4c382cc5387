"""A file that is made: its name, its size, and the bytes of it that are known beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import CheckpointError


@dataclass(frozen=True)
class NewFile:
    """A file to be made.

    Attributes:
        name: relative to the target folder, with ``/`` between folders.
        size: bytes; what nothing is written to stays zero.
        parts: (offset, bytes) of headers, pickles and directories.

    Raises:
        CheckpointError: for a name that leaves the target folder: parts of names are from sources.
    """

    name: str
    size: int
    parts: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        if self.name.startswith("/") or ".." in self.name.split("/"):
            raise CheckpointError(f"{self.name!r} leaves the folder that is made")
