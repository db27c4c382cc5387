"""Layouts that cut one dimension over one axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout.layout import Holding, Layout, Locals
from core_ucp.layout.runs import Picks
from core_ucp.view.boxes import Table

Sizes = Literal["ceil", "balanced", "stored"] | tuple[int, ...]
"""How a length is cut: into blocks of the rounded-up share, of which the last ones are smaller or
empty (``torch.chunk``, DTensor); into shares that differ by one at most, the larger ones first
(``torch.tensor_split``, DeepSpeed's AutoTP); into the given sizes; or into those that are found in
a checkpoint, whatever they are."""

_MOST_BLOCKS = 2**20
"""Blocks of a strided shard: its factor can be from a file."""


@dataclass(frozen=True)
class Shard(Layout):
    """A dimension is cut over an axis.

    Args:
        dim: that is cut.
        axis: of the mesh.
        sizes: how it is cut.
    """

    dim: int
    axis: str
    sizes: Sizes = "ceil"

    def divide(self, holding: Holding) -> Holding:
        extent = holding.runs(self.dim).extent
        parts = holding.mesh.size(self.axis)
        begin, size = cut(extent, parts, holding.along(self.axis), self.sizes)
        return holding.pick(self.dim, Picks.grid(begin[:, None], size[:, None]))

    def undivide(self, found: Locals) -> Locals:
        return found.with_extent(self.dim, found.summed(found.extent(self.dim), self.axis))

    def settle(self, found: Locals) -> tuple[Layout, Locals]:
        if self.sizes != "stored":
            return self, self.undivide(found)
        extent, position = found.extent(self.dim), found.along(self.axis)
        sizes = np.zeros(found.mesh.size(self.axis), np.int64)
        np.maximum.at(sizes, position, extent)
        return replace(self, sizes=tuple(sizes.tolist())), self.undivide(found)


@dataclass(frozen=True)
class StridedShard(Layout):
    """A dimension is cut into blocks, and each block over an axis.

    So FSDP2 cuts a dimension that tensor parallelism cuts as well: ``factor`` is the number of
    tensor-parallel shards, and ``Chain((StridedShard(0, "dp", factor=2), Shard(0, "tp")))`` is what
    DTensor calls ``[_StridedShard(0, split_factor=2), Shard(0)]``.

    Args:
        dim: that is cut.
        axis: of the mesh.
        factor: number of blocks.
    """

    dim: int
    axis: str
    factor: int

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= _MOST_BLOCKS:
            raise CheckpointError(f"{self} cuts a dimension into {self.factor} blocks")

    def divide(self, holding: Holding) -> Holding:
        extent = holding.runs(self.dim).extent[:, None]
        block = np.arange(self.factor, dtype=np.int64)[None, :]
        first, width = cut(extent, self.factor, block, "ceil")
        parts = holding.mesh.size(self.axis)
        begin, size = cut(width, parts, holding.along(self.axis)[:, None], "ceil")
        return holding.pick(self.dim, Picks.grid(first + begin, size))

    def undivide(self, found: Locals) -> Locals:
        return found.with_extent(self.dim, found.summed(found.extent(self.dim), self.axis))


def cut(extent: Table, parts: int, index: Table, sizes: Sizes) -> tuple[Table, Table]:
    """Where parts of lengths begin, and how long they are; arguments broadcast.

    Args:
        extent: lengths that are cut.
        parts: number of parts.
        index: of the wanted part.
        sizes: how it is cut.

    Raises:
        CheckpointError: when given sizes do not add up to the length, or to the number of parts.
    """
    if sizes == "ceil":
        block = -(-extent // parts)
        begin = np.minimum(block * index, extent)
        return begin, np.minimum(block, extent - begin)
    if sizes == "balanced":
        share, more = np.divmod(extent, parts)
        return index * share + np.minimum(index, more), share + (index < more)
    if sizes == "stored":
        raise CheckpointError(
            "the sizes of parts are said to be those that are stored",
            why="nothing is stored yet",
            fix="give sizes, or ceil, or balanced",
        )
    width = np.array(sizes, np.int64)
    if len(width) != parts:
        raise CheckpointError(f"{len(width)} sizes {list(sizes)} are given for {parts} ranks")
    wrong = extent != width.sum()
    if wrong.any():
        length = int(np.atleast_1d(extent)[np.atleast_1d(wrong)][0])
        raise CheckpointError(
            f"a length of {length} is cut into {list(sizes)}", why=f"these are {int(width.sum())}"
        )
    begins = np.cumsum(width) - width
    return begins[index], width[index]
