"""Layouts of DTensors: their placements need no rules."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.tensor import placement_types as kinds

from core.errors import CheckpointError
from core_ucp.layout.holders import Chain, Replicate
from core_ucp.layout.layout import Layout
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.shards import Shard, StridedShard


def layout_of(placements: Sequence[kinds.Placement], mesh: Mesh) -> Layout:
    """The layout that placements of a DTensor stand for.

    DTensor divides from the first dimension of the mesh to the last, each one what the ones before
    have left; the blocks of ``Shard`` are those of ``torch.chunk``.

    Args:
        placements: one for every axis of the mesh.
        mesh: with the axes in the order of the device mesh.

    Raises:
        CheckpointError: for partial sums, and for placements of another mesh.
    """
    if len(placements) != len(mesh.names):
        raise CheckpointError(f"{len(placements)} placements are given for {mesh}")
    layouts = [
        _step(placement, axis) for placement, axis in zip(placements, mesh.names, strict=True)
    ]
    cuts = [layout for layout in layouts if not isinstance(layout, Replicate)]
    if not cuts:
        return Replicate()
    return cuts[0] if len(cuts) == 1 else Chain(tuple(cuts))


def mesh_of(sizes: Sequence[int], names: Sequence[str] | None = None) -> Mesh:
    """The mesh of a DTensor.

    Args:
        sizes: of the dimensions of its device mesh.
        names: of them, where they have any.
    """
    axes = list(names) if names else [f"dim{index}" for index in range(len(sizes))]
    return Mesh(dict(zip(axes, sizes, strict=True)))


def _step(placement: kinds.Placement, axis: str) -> Layout:
    if isinstance(placement, kinds._StridedShard):  # pyright: ignore[reportPrivateUsage]
        return StridedShard(int(placement.dim), axis, int(placement.split_factor))
    if isinstance(placement, kinds.Shard):
        return Shard(int(placement.dim), axis)
    if isinstance(placement, kinds.Replicate):
        return Replicate()
    raise CheckpointError(
        f"a DTensor is placed as {placement} over {axis}",
        why="its shards are summands, of which no copy is the tensor",
    )
