"""The chunks of a tensor that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Held:
    """Reads like a lane of the store: for inputs of a layer that another layer's output is anyway.

    Args:
        tensor: (B, S, ...).
        edges: its chunks.
    """

    def __init__(self, tensor: Tensor, edges: Sequence[int]) -> None:
        self._tensor = tensor
        self._edges = edges

    def get(self, index: int) -> Tensor:
        """A chunk, as a view."""
        return self._tensor[:, self._edges[index] : self._edges[index + 1]]

    def prefetch(self, index: int) -> None:
        """It is there."""

    def done(self, index: int) -> None:
        """Nobody waits for it."""

    def drop(self, index: int) -> None:
        """It belongs to the whole."""
