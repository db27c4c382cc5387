"""Attention over one more block of keys: the step that every row of blocks is made of."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from core.softmax import Partial, merge
from core_fpdt.kernels.contract import Kernel, Scores
from core_fpdt.masks.tiles import Tile


@runtime_checkable
class Merging(Protocol):
    """A kernel that merges a block into what was attended before without a pass of its own."""

    def merge_forward(
        self,
        running: Partial,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile: Tile,
        scores: Scores,
    ) -> Partial:
        """Attend within the block and merge.

        Args:
            running: attention of the same queries over other keys; left as it is.
            query: as in :meth:`Kernel.forward`.
            key: as in :meth:`Kernel.forward`.
            value: as in :meth:`Kernel.forward`.
            tile: as in :meth:`Kernel.forward`.
            scores: as in :meth:`Kernel.forward`.

        Returns:
            What :func:`core.softmax.merge` would.
        """
        ...


def accumulate(
    kernel: Kernel,
    running: Partial | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile: Tile,
    scores: Scores,
) -> Partial:
    """Attention over the keys so far and those of one more block.

    Args:
        kernel: one that works for the block.
        running: attention over the keys so far; None before the first block.
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D) of the block.
        value: (B, Hkv, Tk, Dv) of the block.
        tile: who sees whom in the block.
        scores: how scores are made.

    Returns:
        The output in any float dtype after the first block, and in that of the lse from then on.
    """
    if running is None:
        return kernel.forward(query, key, value, tile, scores)
    if isinstance(kernel, Merging):
        return kernel.merge_forward(running, query, key, value, tile, scores)
    return merge(running, kernel.forward(query, key, value, tile, scores))
