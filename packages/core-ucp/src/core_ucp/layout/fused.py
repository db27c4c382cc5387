"""Parameters that are several ones joined along a dimension, each cut on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout.layout import Holding, Layout, Locals
from core_ucp.layout.runs import Picks
from core_ucp.layout.shards import Sizes, cut
from core_ucp.view.boxes import Table


@dataclass(frozen=True)
class Segment:
    """One of the parameters that are joined.

    Args:
        width: its length along the joined dimension; ``None`` for an equal share of what the
            other segments leave.
        placement: whether the axis cuts it or every rank holds all of it.
        sizes: how it is cut.
    """

    width: int | None = None
    placement: Literal["split", "replicate"] = "split"
    sizes: Sizes = "ceil"


@dataclass(frozen=True)
class Fused(Layout):
    """A dimension is made of segments; a rank holds its part of each, joined in their order.

    ``Fused(0, "tp", (Segment(), Segment()))`` are the equal halves of a gated MLP, and
    ``Fused(0, "tp", (Segment(4096), Segment(1024), Segment(1024)))`` are grouped queries, keys and
    values.

    Args:
        dim: along which they are joined.
        axis: that cuts them.
        segments: in the order of the whole tensor.
    """

    dim: int
    axis: str
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments:
            raise CheckpointError(f"{self} has no segment")

    def divide(self, holding: Holding) -> Holding:
        extent = holding.runs(self.dim).extent
        parts, index = holding.mesh.size(self.axis), holding.along(self.axis)
        first = np.zeros_like(extent)
        begins: list[Table] = []
        lengths: list[Table] = []
        for segment, width in zip(self.segments, self._widths(extent), strict=True):
            begin, size = np.zeros_like(width), width
            if segment.placement == "split":
                begin, size = cut(width, parts, index, segment.sizes)
            begins.append(first + begin)
            lengths.append(size)
            first = first + width
        picks = Picks.grid(np.stack(begins, axis=1), np.stack(lengths, axis=1))
        return holding.pick(self.dim, picks)

    def settle(self, found: Locals) -> tuple[Layout, Locals]:
        if all(segment.sizes != "stored" for segment in self.segments):
            return self, self.undivide(found)
        count = len(self.segments)
        if self.segments != (Segment(sizes="stored"),) * count:
            raise CheckpointError(
                f"the widths under {self} cannot be told from what ranks hold",
                why="only segments that share every rank's part evenly can",
                fix="give the sizes of every segment",
            )
        sizes = np.zeros(found.mesh.size(self.axis), np.int64)
        np.maximum.at(sizes, found.along(self.axis), found.extent(self.dim) // count)
        settled = Segment(int(sizes.sum()), sizes=tuple(sizes.tolist()))
        layout = replace(self, segments=(settled,) * count)
        return layout, layout.undivide(found)

    def undivide(self, found: Locals) -> Locals:
        local = found.extent(self.dim)
        if all(segment.width is not None for segment in self.segments):
            whole = sum(segment.width or 0 for segment in self.segments)
            return found.with_extent(self.dim, whole)
        copied = [segment for segment in self.segments if segment.placement == "replicate"]
        if any(segment.width is None for segment in copied):
            raise CheckpointError(
                f"the widths under {self} cannot be told from what ranks hold",
                fix="give the width of every replicated segment",
            )
        width = sum(segment.width or 0 for segment in copied)
        return found.with_extent(self.dim, found.summed(local - width, self.axis) + width)

    def _widths(self, extent: Table) -> list[Table]:
        """Lengths of the segments in the tensor of every rank."""
        known = sum(segment.width or 0 for segment in self.segments)
        shared = sum(segment.width is None for segment in self.segments)
        rest = extent - known
        uneven = (rest % shared != 0) | (rest < 0) if shared else rest != 0
        if uneven.any():
            raise CheckpointError(
                f"dimension {self.dim} has length {int(extent[uneven][0])}",
                why=f"it is not made of the {len(self.segments)} segments of {self}",
            )
        each = rest // max(1, shared)
        return [
            each if segment.width is None else np.full_like(extent, segment.width)
            for segment in self.segments
        ]
