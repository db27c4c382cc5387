"""What a conversion makes: files, the bytes that are known beforehand, and the places of atoms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core_ucp.files.new_file import NewFile as NewFile
from core_ucp.view.view import Atom

Digests = Mapping[str, str]
"""Layout-invariant digest of every converted atom, by key; see :mod:`core_ucp.execution.digest`."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """An atom of the source that goes into the files of a target, whole or in part.

    Attributes:
        key: of the atom in the source.
        atom: shape and dtype it is wanted in, and where each box of it goes. Boxes may be missing
            (then nobody holds them) or there several times (then all copies are written).
    """

    key: str
    atom: Atom


def nothing_more(folder: Path, digests: Digests) -> None:
    """Leave a target as it is: the default of ``finish``."""


@dataclass(frozen=True, eq=False)
class Target:
    """A checkpoint to be made in an empty folder.

    Attributes:
        files: all files; indices of pieces refer to this order.
        wanted: where atoms go.
        finish: makes what depends on the written bytes, when all files are durable.
        remarks: what a user should know: what was re-derived, left out, or cannot be honoured.
    """

    files: tuple[NewFile, ...]
    wanted: tuple[Wanted, ...]
    finish: Callable[[Path, Digests], None] = nothing_more
    remarks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)
