"""Layouts of DTensors are where torch puts the elements: its function, its tensors, FSDP2 with TP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.errors import CheckpointError
from core_ucp.layout import layouts
from core_ucp.layout.dtensor import layout_of, mesh_of
from core_ucp.layout.layouts import Chain, Layout, StridedShard
from core_ucp.layout.mesh import Mesh


@contextmanager
def rank_of(rank: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> Iterator[DeviceMesh]:
    """One rank of a world without others: shards are cut locally, and nothing is sent."""
    mesh = Mesh(dict(zip(names, sizes, strict=True)))
    dist.init_process_group("fake", rank=rank, world_size=mesh.ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def local(x: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    """What a rank holds, put together from the boxes of the layout."""
    placed = layout.place(x.shape, mesh, mesh.coordinate(rank))
    out = torch.full(placed.shape, -1, dtype=x.dtype)
    for start, size, there in zip(placed.boxes.start, placed.boxes.size, placed.local, strict=True):
        here = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
        out[tuple(slice(a, a + b) for a, b in zip(there, size, strict=True))] = x[here]
    return out


@st.composite
def placements(draw: st.DrawFn, dims: int, axes: int) -> list[Placement]:
    dim = st.integers(0, dims - 1)
    kinds = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, dim),
        st.builds(lambda d, f: _StridedShard(d, split_factor=f), dim, st.integers(1, 4)),
    )
    return [draw(kinds) for _ in range(axes)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shapes_and_offsets_are_those_of_torch(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 7, 12]), min_size=1, max_size=3)))
    kinds = data.draw(placements(len(shape), len(sizes)))
    mesh = mesh_of(sizes)
    layout = layout_of(kinds, mesh)
    for rank in range(mesh.ranks):
        at = mesh.coordinate(rank)
        expected, offset = _compute_local_shape_and_global_offset(shape, sizes, list(at), kinds)
        placed = layout.place(shape, mesh, at)
        assert placed.shape == tuple(expected)
        if placed.numel:
            assert placed.boxes.start.min(axis=0).tolist() == list(offset)


CASES: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((7, 3), [Shard(0), Shard(0)]),
    ((7, 3), [_StridedShard(0, split_factor=3), Shard(0)]),
    ((13, 5), [_StridedShard(1, split_factor=3), Shard(1)]),
    ((2, 5), [Shard(0), Shard(1)]),
    ((1,), [Shard(0), Replicate()]),
    ((11, 2, 3), [Replicate(), Shard(0)]),
]


def test_shards_are_those_of_real_dtensors() -> None:
    sizes, names = (2, 3), ("dp", "tp")
    mesh = Mesh(dict(zip(names, sizes, strict=True)))
    for rank in range(mesh.ranks):
        with rank_of(rank, sizes, names) as devices:
            for shape, kinds in CASES:
                x = torch.arange(torch.Size(shape).numel()).reshape(shape)
                real = distribute_tensor(x, devices, kinds, src_data_rank=None)
                layout = layout_of(real.placements, mesh)
                assert torch.equal(local(x, layout, mesh, rank), real.to_local())


def test_fsdp2_over_tensor_parallelism_is_found_in_place() -> None:
    sizes, names = (3, 2), ("dp", "tp")
    mesh = Mesh(dict(zip(names, sizes, strict=True)))
    seen: set[type[Layout]] = set()
    for rank in range(mesh.ranks):
        with rank_of(rank, sizes, names) as devices:
            model = torch.nn.Sequential(torch.nn.Linear(4, 14), torch.nn.Linear(14, 5))
            whole: dict[str, torch.Tensor] = {}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
                    whole[name] = parameter.detach().clone()
            plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            parallelize_module(model, devices["tp"], plan, src_data_rank=None)
            fully_shard(model, mesh=devices["dp"])
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                layout = layout_of(parameter.placements, mesh)
                seen.add(type(layout.layouts[0]) if isinstance(layout, Chain) else type(layout))
                mine = local(whole[name], layout, mesh, rank)
                assert torch.equal(mine, parameter.to_local().detach())
    assert StridedShard in seen


def test_replicas_and_sums() -> None:
    mesh = mesh_of((2, 2), ("dp", "tp"))
    assert layout_of([Replicate(), Replicate()], mesh) == layouts.Replicate()
    assert layout_of([Replicate(), Shard(1)], mesh) == layouts.Shard(1, "tp")
    with pytest.raises(CheckpointError, match="summands"):
        layout_of([Partial(), Shard(0)], mesh)
    with pytest.raises(CheckpointError, match="1 placements are given for the mesh dp=2 x tp=2"):
        layout_of([Shard(0)], mesh)
