"""DTensors in pickles, read without ``torch.distributed``: placements, mesh, and the local part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.distributed.tensor.placement_types import (
    Placement,
    Replicate,
    Shard,
    _StridedShard,  # pyright: ignore[reportPrivateUsage] # FSDP over tensor parallelism makes it
)

from core.errors import CheckpointError
from core_ucp.files.pickles import Inert, Located
from core_ucp.layout.dtensor import layout_of, mesh_of
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.placement import Placement as Placed
from core_ucp.view.pieces import Pieces

CLASSES = (
    "torch.distributed.*",
    "torch._utils._rebuild_wrapper_subclass",
    "torch.serialization._get_layout",
)
"""Names that the pickle of a DTensor is made of."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        local: the rank's own part.
        placements: over the dimensions of the mesh.
        mesh: of the ranks.
        at: coordinate of the rank.
    """

    shape: tuple[int, ...]
    local: Located
    placements: tuple[Placement, ...]
    mesh: Mesh
    at: tuple[int, ...]

    def pieces(self) -> Pieces:
        """Where the boxes of the tensor lie that the rank holds.

        Raises:
            CheckpointError: when the local part has another shape than the placements say.
        """
        placed = _placed(self.shape, self.placements, self.mesh, self.at)
        if placed.shape != self.local.shape:
            raise CheckpointError(
                f"{self.mesh.words(self.at)} holds {list(self.local.shape)}",
                why=f"its placements give it {list(placed.shape)} of {list(self.shape)}",
            )
        step = np.array(self.local.stride, np.int64) * self.local.dtype.itemsize
        count = len(placed.boxes)
        stride = np.repeat(step.reshape(1, -1), count, axis=0)
        offset = self.local.offset + (placed.local * stride).sum(axis=1)
        return Pieces(placed.boxes, np.full(count, self.local.file, np.int64), offset, stride)


@lru_cache(maxsize=1 << 16)
def _placed(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: Mesh, at: tuple[int, ...]
) -> Placed:
    """What a rank holds: the same for a weight, its states, and the weights of other layers."""
    return layout_of(placements, mesh).place(shape, mesh, at)


def is_dtensor(value: Any) -> bool:
    """Whether an inert object is a DTensor."""
    return isinstance(value, Inert) and value.kind.rpartition(".")[2] == "DTensor"


def part_of(value: Inert) -> Part:
    """What the pickle of a DTensor says.

    Raises:
        CheckpointError: for a DTensor that is damaged, or of a version that is not known.
    """
    try:
        return _part(value)
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError("a DTensor cannot be read", why=str(error)) from None


def _part(value: Inert) -> Part:
    rebuilt: Inert = value.arguments[0]
    shape = tuple(int(size) for size in rebuilt.arguments[2])
    state: Any = value.state
    attributes: Mapping[str, Any] = state[1] if isinstance(state, tuple) else state
    local, spec = attributes["_local_tensor"], attributes["_spec"]
    if not isinstance(local, Located):
        raise CheckpointError("a DTensor has no local tensor")
    sizes = _sizes(spec.get("mesh"))
    found = spec.get("mesh").get("_coordinate_on_dim")
    if found is None:
        raise CheckpointError("a DTensor was saved by a rank outside of its mesh")
    names = spec.get("mesh").get("_mesh_dim_names") or spec.get("mesh").get("mesh_dim_names")
    placements = tuple(_placement(placement) for placement in spec.get("placements"))
    return Part(shape, local, placements, mesh_of(sizes, names), tuple(map(int, found)))


def _sizes(mesh: Inert) -> list[int]:
    """Sizes of a device mesh, which versions of torch have kept in several ways."""
    kept = mesh.get("mesh")
    if isinstance(kept, Located):
        return list(kept.shape)
    layout: Inert = mesh.get("_layout")
    axes: Sequence[Inert] | None = layout.get("axes")
    shapes = layout.get("shape") if axes is None else [axis.get("shape") for axis in axes]
    return [int(np.prod(shape, dtype=np.int64)) for shape in shapes]


def _placement(value: Inert) -> Placement:
    match value.kind.rpartition(".")[2]:
        case "Replicate":
            return Replicate()
        case "Shard":
            return Shard(int(value.get("dim")))
        case "_StridedShard":
            return _StridedShard(int(value.get("dim")), split_factor=int(value.get("split_factor")))
        case kind:
            raise CheckpointError(
                f"a DTensor is placed as {kind}", why="its parts are no parts of the tensor's bits"
            )
