"""Layouts in which ranks hold named blocks of a dimension: gathers and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout.layout import Holding, Layout, Locals
from core_ucp.layout.runs import Picks
from core_ucp.layout.shards import Shard
from core_ucp.view.boxes import Table

Blocks = tuple[tuple[int, ...], ...]
"""Indices of the blocks that every position of an axis holds, in the order it holds them."""


@dataclass(frozen=True)
class Gather(Layout):
    """A dimension is made of equal blocks; every position of an axis holds some, in its own order.

    A block that several positions hold is replicated, such as the keys and values of a model with
    fewer of these heads than tensor-parallel ranks.

    Args:
        dim: that is made of blocks.
        axis: of the mesh.
        blocks: that every position holds.
        count: number of all blocks; one more than the largest index unless given.
    """

    dim: int
    axis: str
    blocks: Blocks
    count: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(tuple(row) for row in self.blocks))
        named = {index for row in self.blocks for index in row}
        lacking = sorted(set(range(self.number)) ^ named)
        if lacking or not named:
            raise CheckpointError(f"{self} leaves out or adds the blocks {lacking}")

    @property
    def number(self) -> int:
        """Number of all blocks."""
        if self.count is not None:
            return self.count
        return 1 + max((index for row in self.blocks for index in row), default=-1)

    def divide(self, holding: Holding) -> Holding:
        extent = holding.runs(self.dim).extent
        if (extent % self.number).any():
            raise CheckpointError(
                f"dimension {self.dim} has length {int(extent[0])}",
                why=f"it is not made of the {self.number} equal blocks of {self}",
            )
        width = extent // self.number
        row, block = _listed(self.blocks, holding.along(self.axis), holding.mesh.size(self.axis))
        return holding.pick(self.dim, Picks(row, block * width[row], width[row]))

    def undivide(self, found: Locals) -> Locals:
        held = np.array([len(row) for row in self.blocks], np.int64)[found.along(self.axis)]
        width = found.extent(self.dim) // np.maximum(held, 1)
        # Who holds no block cannot tell their width; the largest answer of all ranks counts.
        return found.with_extent(self.dim, np.where(held > 0, width * self.number, 0))


@dataclass(frozen=True)
class Expert(Layout):
    """A dimension counts experts, and every position of an axis holds some of them.

    Args:
        dim: that counts experts, 0 in most models.
        axis: of the mesh.
        placement: ``"ceil"`` or ``"balanced"`` for consecutive experts, as :class:`Shard` cuts
            them, or the experts of every position.
    """

    dim: int
    axis: str
    placement: Literal["ceil", "balanced"] | Blocks = "ceil"

    def __post_init__(self) -> None:
        if not isinstance(self.placement, str):
            object.__setattr__(self, "placement", tuple(tuple(row) for row in self.placement))

    def divide(self, holding: Holding) -> Holding:
        if isinstance(self.placement, str):
            return Shard(self.dim, self.axis, self.placement).divide(holding)
        gather = Gather(self.dim, self.axis, self.placement)
        experts = holding.runs(self.dim).extent
        if (experts != gather.number).any():
            raise CheckpointError(f"{self} places {gather.number} of {int(experts[0])} experts")
        return gather.divide(holding)

    def undivide(self, found: Locals) -> Locals:
        if isinstance(self.placement, str):
            return Shard(self.dim, self.axis, self.placement).undivide(found)
        found.extent(self.dim)
        return found.with_extent(self.dim, Gather(self.dim, self.axis, self.placement).number)


def _listed(blocks: Blocks, position: Table, size: int) -> tuple[Table, Table]:
    """(row, block) of all blocks that ranks at the positions hold."""
    if len(blocks) != size:
        raise CheckpointError(f"blocks of {len(blocks)} positions are given for {size} ranks")
    counts = np.array([len(row) for row in blocks], np.int64)
    flat = np.array([index for row in blocks for index in row], np.int64)
    first = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(position), dtype=np.int64), counts[position])
    place = np.arange(len(row), dtype=np.int64)
    place -= np.repeat(np.cumsum(counts[position]) - counts[position], counts[position])
    return row, flat[first[position[row]] + place]
