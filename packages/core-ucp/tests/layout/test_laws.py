"""Laws of layouts: what is scattered comes back, and goes from any layout to any other one.

Tensors count their own elements, so that one element in the wrong place is seen.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import CheckpointError
from core_ucp.layout import toml
from core_ucp.layout.gather import Local, gather
from core_ucp.layout.layouts import (
    Chain,
    Expert,
    Fused,
    Gather,
    Layout,
    Owner,
    Pad,
    Replicate,
    Segment,
    Shard,
    StridedShard,
)
from core_ucp.layout.mesh import Coordinate, Mesh
from core_ucp.layout.rules import Rule, Rules
from core_ucp.view.boxes import overlaps
from core_ucp.view.pieces import Pieces, join

AXES = {"pp": 3, "tp": 4, "dp": 5, "ep": 4}
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 12, 13]
LAWS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

Tensors = dict[Coordinate, np.ndarray]


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    axes = {name: draw(st.integers(1, most)) for name, most in AXES.items()}
    return Mesh(axes, tuple(draw(st.permutations(list(axes)))))


shapes = st.lists(st.sampled_from(SIZES), max_size=3).map(tuple)


@st.composite
def parts_of(draw: st.DrawFn, total: int, count: int) -> tuple[int, ...]:
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


@st.composite
def blocks_of(draw: st.DrawFn, count: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Every block on one rank at least, in any order, and sometimes on several."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for block in draw(st.permutations(range(count))):
        for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=2)):
            held[rank].append(block)
    return tuple(tuple(row) for row in held)


@st.composite
def fused(draw: st.DrawFn, dim: int, axis: str, extent: int, ranks: int) -> Fused:
    widths = draw(parts_of(extent, draw(st.integers(1, 3))))
    segments = []
    for width in widths:
        sizes = draw(st.sampled_from(["ceil", "balanced"]) | parts_of(width, ranks))
        placement = draw(st.sampled_from(["split", "split", "replicate"]))
        segments.append(Segment(width, placement, sizes))
    return Fused(dim, axis, tuple(segments))


@st.composite
def first_cut(draw: st.DrawFn, dim: int, axis: str, extent: int, ranks: int) -> list[Layout]:
    """How a dimension that nobody has cut yet is divided over an axis."""
    kinds = ["shard", "sizes", "fused", "pad"]
    kinds += ["gather"] * (extent > 0) + ["expert"] * (extent > 0)
    match draw(st.sampled_from(kinds)):
        case "shard":
            return [Shard(dim, axis, draw(st.sampled_from(["ceil", "balanced"])))]
        case "sizes":
            return [Shard(dim, axis, draw(parts_of(extent, ranks)))]
        case "fused":
            return [draw(fused(dim, axis, extent, ranks))]
        case "pad":
            multiple = draw(st.integers(1, 5))
            over = draw(st.sampled_from([axis, None]))
            pad = Pad(dim, multiple=multiple, axis=over, unpadded=extent)
            return [pad, Shard(dim, axis)]
        case "gather":
            count = draw(st.sampled_from([n for n in (1, 2, 3, 4, extent) if extent % n == 0]))
            return [Gather(dim, axis, draw(blocks_of(count, ranks)))]
        case _:
            spread = st.sampled_from(["ceil", "balanced"]) | blocks_of(extent, ranks)
            return [Expert(dim, axis, draw(spread))]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], mesh: Mesh) -> Layout:
    """Any composition in which every axis has one task."""
    steps: list[Layout] = []
    cut: set[int] = set()
    for axis in draw(st.permutations(list(mesh.axes))):
        kinds = ["none", "owner"] + ["cut"] * 3 * bool(shape)
        kind = draw(st.sampled_from(kinds))
        if kind == "owner":
            places = st.sets(st.integers(0, mesh.size(axis) - 1), min_size=1)
            steps.append(Owner({axis: tuple(draw(places))}))
        elif kind == "cut":
            dim = draw(st.integers(0, len(shape) - 1))
            if dim in cut:
                factor = draw(st.integers(1, 4))
                steps.append(
                    draw(st.sampled_from([Shard(dim, axis), StridedShard(dim, axis, factor)]))
                )
            else:
                steps += draw(first_cut(dim, axis, shape[dim], mesh.size(axis)))
            cut.add(dim)
    return Chain(tuple(steps)) if steps else Replicate()


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Mesh, Layout]:
    shape, mesh = draw(shapes), draw(meshes())
    return shape, mesh, draw(layouts(shape, mesh))


def counted(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def scatter(x: np.ndarray, layout: Layout, mesh: Mesh) -> Tensors:
    """What every coordinate holds; padding is -1."""
    tensors: Tensors = {}
    for at in layout.holders(mesh):
        placed = layout.place(x.shape, mesh, at)
        assert placed.held
        tensors[at] = np.full(placed.shape, -1, np.int64)
        for start, size, local in zip(
            placed.boxes.start, placed.boxes.size, placed.local, strict=True
        ):
            there = tuple(slice(a, a + b) for a, b in zip(local, size, strict=True))
            here = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
            assert (tensors[at][there] == -1).all(), "two boxes lie in one place"
            tensors[at][there] = x[here]
    return tensors


def atom_of(tensors: Tensors, layout: Layout, mesh: Mesh):
    local = {at: Local(i, 0, t.shape) for i, (at, t) in enumerate(tensors.items())}
    return gather("x", layout, mesh, local, torch.int64)


def strided(pieces: Pieces, row: int, buffers: list[np.ndarray]) -> np.ndarray:
    steps = tuple(int(step) for step in pieces.stride[row])
    size = tuple(int(side) for side in pieces.boxes.size[row])
    buffer = buffers[int(pieces.file[row])]
    return np.ndarray(size, np.int64, buffer.data, int(pieces.offset[row]), steps)


def read(shape: tuple[int, ...], pieces: Pieces, tensors: Tensors) -> np.ndarray:
    out = np.full(shape, -1, np.int64)
    buffers = list(tensors.values())
    for row, (start, end) in enumerate(zip(pieces.boxes.start, pieces.boxes.end, strict=True)):
        box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
        out[box] = strided(pieces, row, buffers)
    return out


@LAWS
@given(cases())
def test_what_is_scattered_is_gathered(case: tuple[tuple[int, ...], Mesh, Layout]) -> None:
    shape, mesh, layout = case
    x = counted(shape)
    tensors = scatter(x, layout, mesh)
    atom = atom_of(tensors, layout, mesh)
    assert atom.shape == shape
    assert (read(shape, atom.pieces, tensors) == x).all()
    if atom.replicas is not None:
        copies = read(shape, atom.replicas, tensors)
        assert ((copies == x) | (copies == -1)).all()
    held = sum(int((tensor >= 0).sum()) for tensor in tensors.values())
    copied = 0 if atom.replicas is None else int(atom.replicas.boxes.volume.sum())
    assert int(atom.pieces.boxes.volume.sum()) + copied == held


@LAWS
@given(st.data())
def test_any_layout_goes_to_any_other(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    (mesh, source), (other, target) = (
        (mesh, data.draw(layouts(shape, mesh)))
        for mesh in (data.draw(meshes()), data.draw(meshes()))
    )
    x = counted(shape)
    old, expected = scatter(x, source, mesh), scatter(x, target, other)
    new = {at: np.full_like(tensor, -1) for at, tensor in expected.items()}
    have = atom_of(old, source, mesh).pieces
    want = join(
        [
            target.place(shape, other, at).pieces(file, 0, 8)
            for file, at in enumerate(target.holders(other))
        ]
    )
    a, b, common = overlaps(have.boxes, want.boxes)
    sources, sinks = have.cut(a, common), want.cut(b, common)
    for row in range(len(common)):
        strided(sinks, row, list(new.values()))[...] = strided(sources, row, list(old.values()))
    for at, tensor in expected.items():
        assert (new[at] == tensor).all()
    written = int(common.volume.sum())
    assert written == sum(int((tensor >= 0).sum()) for tensor in expected.values())


@LAWS
@given(cases())
def test_one_coordinate_and_all_of_them_agree(
    case: tuple[tuple[int, ...], Mesh, Layout],
) -> None:
    shape, mesh, layout = case
    together = layout.place_all(shape, mesh)
    for rank in range(mesh.ranks):
        alone, row = layout.place(shape, mesh, mesh.coordinate(rank)), together.one(rank)
        assert (alone.shape, alone.held, alone.numel) == (row.shape, row.held, row.numel)
        for left, right in zip(
            (alone.boxes.start, alone.boxes.size, alone.local),
            (row.boxes.start, row.boxes.size, row.local),
            strict=True,
        ):
            assert left.tolist() == right.tolist()


@LAWS
@given(cases())
def test_a_layout_is_the_same_after_toml_and_json(
    case: tuple[tuple[int, ...], Mesh, Layout],
) -> None:
    _, mesh, layout = case
    rules = Rules(
        (Rule("x.{n}", layout, dtype=torch.bfloat16, paper="fragment_params"),), mesh=mesh
    )
    assert toml.loads(toml.dumps(rules)) == rules
    assert toml.loads(json.dumps(toml.table_of_rules(rules)), json_form=True) == rules
    assert toml.layout_from(toml.table_of_layout(layout)) == layout


@LAWS
@given(cases(), st.data())
def test_a_tensor_that_does_not_fit_is_refused(
    case: tuple[tuple[int, ...], Mesh, Layout], data: st.DataObject
) -> None:
    shape, mesh, layout = case
    tensors = scatter(counted(shape), layout, mesh)
    local = {at: Local(0, 0, tensor.shape) for at, tensor in tensors.items()}
    victim = data.draw(st.sampled_from(list(local)))
    odd = {**local, victim: Local(0, 0, (*tensors[victim].shape, 1))}
    if len(local) > 1:
        with pytest.raises(CheckpointError, match="x cannot be put together"):
            gather("x", layout, mesh, odd, torch.int64)
    del local[victim]
    with pytest.raises(CheckpointError, match=f"nothing is there of {mesh.words(victim)}"):
        gather("x", layout, mesh, local, torch.int64)


@LAWS
@given(st.integers(0, 40), st.integers(1, 9))
def test_blocks_are_those_of_torch(length: int, ranks: int) -> None:
    mesh, x = Mesh({"r": ranks}), torch.arange(length)
    chunks = list(torch.chunk(x, ranks)) if length else []
    chunks += [x[:0]] * (ranks - len(chunks))
    splits = torch.tensor_split(x, ranks)
    for sizes, parts in (("ceil", chunks), ("balanced", splits)):
        tensors = scatter(x.numpy(), Shard(0, "r", sizes), mesh)
        assert [t.tolist() for t in tensors.values()] == [part.tolist() for part in parts]
