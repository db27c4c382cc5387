"""Dimensions that are made longer than they are, so that ranks hold equal parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout.layout import Holding, Layout, Locals


@dataclass(frozen=True)
class Pad(Layout):
    """A dimension is followed by padding, as the rows of a vocabulary are.

    A following :class:`Shard` cuts the padded length. What was there before the padding is not in
    the shapes that ranks hold, so ``unpadded`` says it where a whole shape is to be told from them.

    Args:
        dim: that is padded.
        multiple: of which the padded length is the next one; times the size of ``axis``.
        size: the padded length itself, instead; or ``"stored"`` for the one that is found in a
            checkpoint.
        axis: of the mesh; Megatron pads to a multiple of its tensor-parallel ranks.
        unpadded: length without padding, such as the size of the vocabulary.
    """

    dim: int
    multiple: int | None = None
    size: int | Literal["stored"] | None = None
    axis: str | None = None
    unpadded: int | None = None

    def __post_init__(self) -> None:
        if (self.multiple is None) == (self.size is None):
            raise CheckpointError(f"{self} needs one of multiple and size")
        if self.size != "stored" and (self.multiple or self.size or 0) < 1:
            raise CheckpointError(f"{self} pads to nothing")
        if self.axis is not None and self.multiple is None:
            raise CheckpointError(f"{self} names an axis for a fixed size")

    def divide(self, holding: Holding) -> Holding:
        runs = holding.runs(self.dim)
        if self.unpadded is not None and (runs.extent != self.unpadded).any():
            raise CheckpointError(
                f"dimension {self.dim} has length {int(runs.extent[0])}",
                why=f"it should be {self.unpadded} under {self}",
            )
        if self.multiple is not None:
            unit = self.multiple * (holding.mesh.size(self.axis) if self.axis else 1)
            return holding.with_runs(self.dim, replace(runs, extent=-(-runs.extent // unit) * unit))
        if self.size == "stored":
            raise CheckpointError(
                "the padded length is said to be the one that is stored",
                why="nothing is stored yet",
                fix="give a size or a multiple",
            )
        size = np.full_like(runs.extent, self.size)
        if (size < runs.extent).any():
            raise CheckpointError(
                f"dimension {self.dim} has length {int(runs.extent.max())}",
                why=f"it does not fit into {self.size}",
            )
        return holding.with_runs(self.dim, replace(runs, extent=size))

    def settle(self, found: Locals) -> tuple[Layout, Locals]:
        if self.size != "stored":
            return self, self.undivide(found)
        size = int(found.extent(self.dim).max())
        return replace(self, size=size), self.undivide(found)

    def undivide(self, found: Locals) -> Locals:
        found.extent(self.dim)
        if self.unpadded is None:
            raise CheckpointError(
                f"the length of dimension {self.dim} without its padding is not known",
                fix="give `unpadded` in the rule, such as the size of the vocabulary",
            )
        return found.with_extent(self.dim, self.unpadded)
