"""A DCP file before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] # stock readers unpickle this class
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from core_fastpersist.direct.pieces import Piece


@dataclass
class Image:
    """What a file will be made of.

    Args:
        items: what the plan wants in it.
        size: bytes.
        pieces: all its bytes.
        places: of every item first byte and length.
    """

    items: list[WriteItem]
    size: int
    pieces: list[Piece]
    places: list[tuple[WriteItem, int, int]]
    _named: tuple[str, list[WriteResult]] | None = field(default=None, repr=False)

    def results(self, name: str) -> list[WriteResult]:
        """Where every item is, in a file of this name; the same list for the same name."""
        if self._named is None or self._named[0] != name:
            self._named = (
                name,
                [
                    WriteResult(item.index, length, _StorageInfo(name, offset, length))
                    for item, offset, length in self.places
                ],
            )
        return self._named[1]
