"""A DCP file before it is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.checkpoint.planner import WriteItem

from core_fastpersist.direct.pieces import Piece


@dataclass(frozen=True)
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
