"""A tile: who sees whom between some queries and some keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor


class Kind(Enum):
    """What a kernel has to do in a tile."""

    EMPTY = "empty"
    """No query sees a key: neither computed nor fetched."""
    FULL = "full"
    """Every query sees every key."""
    CAUSAL = "causal"
    """Query ``i`` of the tile sees keys ``0..i`` of the tile."""
    PARTIAL = "partial"
    """:meth:`Tile.visible` tells."""


@dataclass(frozen=True)
class Tile:
    """Who sees whom between queries ``[q0, q1)`` and keys ``[k0, k1)`` of a sequence.

    Args:
        kind: what a kernel has to do.
        queries: the half-open range of queries, in tokens of the whole sequence.
        keys: the half-open range of keys.
        evaluate: makes :meth:`visible`; only of partial tiles.
    """

    kind: Kind
    queries: tuple[int, int]
    keys: tuple[int, int]
    evaluate: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    def visible(self) -> Tensor:
        """(B or 1, H or 1, Tq, Tk) booleans on the device of the mask; of any kind but empty.

        Cached by whoever made the tile: asking again costs nothing.
        """
        if self.evaluate is None:
            raise ValueError(f"a tile that is {self.kind.value} has no mask")
        return self.evaluate()
