"""What single layouts mean, in numbers, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from core.errors import CheckpointError
from core_ucp.layout.averaging import mean
from core_ucp.layout.gather import Local, gather
from core_ucp.layout.layouts import (
    Average,
    Chain,
    Expert,
    Fused,
    Gather,
    Layout,
    Owner,
    Pad,
    Refused,
    Replicate,
    Segment,
    Shard,
    StridedShard,
)
from core_ucp.layout.mesh import Mesh
from core_ucp.view.files import Files

TP = Mesh({"tp": 2})


def rows(layout: Layout, length: int, mesh: Mesh = TP) -> list[list[int]]:
    """Elements of a vector that every rank holds, in its order; padding is -1."""
    held: list[list[int]] = []
    for rank in range(mesh.ranks):
        placed = layout.place((length,), mesh, mesh.coordinate(rank))
        out = np.full(placed.numel, -1)
        for start, size, local in zip(
            placed.boxes.start[:, 0], placed.boxes.size[:, 0], placed.local[:, 0], strict=True
        ):
            out[local : local + size] = np.arange(start, start + size)
        held.append(out.tolist())
    return held


@pytest.mark.parametrize(
    ("layout", "length", "expected"),
    [
        (Replicate(), 2, [[0, 1], [0, 1]]),
        (Shard(0, "tp"), 3, [[0, 1], [2]]),
        (Shard(0, "tp"), 1, [[0], []]),
        (Shard(0, "tp", (1, 2)), 3, [[0], [1, 2]]),
        (StridedShard(0, "tp", 2), 7, [[0, 1, 4, 5], [2, 3, 6]]),
        (Fused(0, "tp", (Segment(), Segment())), 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (Fused(0, "tp", (Segment(4), Segment(2))), 6, [[0, 1, 4], [2, 3, 5]]),
        (Fused(0, "tp", (Segment(2), Segment(None, "replicate"))), 5, [[0, 2, 3, 4], [1, 2, 3, 4]]),
        (Fused(0, "tp", (Segment(3, sizes=(1, 2)), Segment(1, sizes=(1, 0)))), 4, [[0, 3], [1, 2]]),
        (Gather(0, "tp", ((2, 0), (1,))), 6, [[4, 5, 0, 1], [2, 3]]),
        (Expert(0, "tp"), 3, [[0, 1], [2]]),
        (Expert(0, "tp", ((2,), (0, 1))), 3, [[2], [0, 1]]),
        (Owner({"tp": 1}), 2, [[], [0, 1]]),
        (Average("tp"), 1, [[0], [0]]),
        (
            Chain((Pad(0, multiple=2, axis="tp"), Shard(0, "tp"))),
            5,
            [[0, 1, 2, 3], [4, -1, -1, -1]],
        ),
        (Chain((Pad(0, size=6), Shard(0, "tp"))), 4, [[0, 1, 2], [3, -1, -1]]),
        (Chain((Shard(0, "tp"), Pad(0, multiple=3))), 3, [[0, 1, -1], [2, -1, -1]]),
    ],
    ids=str,
)
def test_who_holds_what(layout: Layout, length: int, expected: list[list[int]]) -> None:
    assert rows(layout, length) == expected


def test_balanced_and_rounded_up_shares_differ() -> None:
    mesh = Mesh({"tp": 4})
    assert [len(r) for r in rows(Shard(0, "tp"), 10, mesh)] == [3, 3, 3, 1]
    assert [len(r) for r in rows(Shard(0, "tp", "balanced"), 10, mesh)] == [3, 3, 2, 2]


def test_experts_over_one_axis_are_cut_over_another() -> None:
    mesh = Mesh({"ep": 2, "tp": 2})
    layout = Chain((Expert(0, "ep"), Shard(2, "tp")))
    placed = layout.place((4, 3, 6), mesh, mesh.at(ep=1, tp=1))
    assert placed.boxes.start.tolist() == [[2, 0, 3]]
    assert placed.shape == (2, 3, 3)
    assert layout.logical_shape(dict.fromkeys(mesh.coordinates(), (2, 3, 3)), mesh) == (4, 3, 6)


def test_stored_sizes_are_those_that_are_found() -> None:
    layout = Chain((Pad(0, size="stored", unpadded=6), Shard(0, "tp", "stored")))
    settled, shape, *_ = layout.fit({(0,): (5, 2), (1,): (3, 2)}, TP)
    assert shape == (6, 2)
    assert settled == Chain((Pad(0, size=8, unpadded=6), Shard(0, "tp", (5, 3))))
    halves = Fused(0, "tp", (Segment(sizes="stored"),) * 2)
    settled, shape, *_ = halves.fit({(0,): (6,), (1,): (2,)}, TP)
    assert shape == (8,)
    assert rows(settled, 8) == [[0, 1, 2, 4, 5, 6], [3, 7]]


FITTED: list[tuple[Layout, dict[tuple[int, ...], tuple[int, ...]], str]] = [
    (Shard(0, "tp"), {(0,): (1,), (1,): (2,)}, "tp=0 holds \\[1\\]: a tensor of \\[3\\]"),
    (Shard(0, "tp"), {(0,): (1,)}, "nothing is there of tp=1"),
    (Shard(0, "tp"), {(0,): (1,), (1,): (1,), (2,): (1,)}, "coordinate \\[2\\] holds something"),
    (Shard(0, "tp"), {(0,): (1,), (1,): (1, 1)}, "no parts of one tensor"),
    (Shard(1, "tp"), {(0,): (1,), (1,): (1,)}, "has no dimension 1"),
    (Shard(0, "dp"), {(0,): (1,), (1,): (1,)}, "has no axis 'dp'"),
    (Shard(0, "tp", (1, 1, 1)), {(0,): (1,), (1,): (1,)}, "3 sizes .* are given for 2 ranks"),
    (Shard(0, "tp", (2, 2)), {(0,): (2,), (1,): (1,)}, "length of 3 is cut into \\[2, 2\\]"),
    (Chain((Owner({"tp": 0}), Owner({"tp": 1}))), {}, "nobody holds a tensor"),
    (Replicate(), {(0,): (2,), (1,): (3,)}, "tp=0 holds \\[2\\]"),
    (Owner({"tp": 0}), {(0,): (2,), (1,): (2,)}, "coordinate \\[1\\] holds something"),
    (Pad(0, multiple=4), {(0,): (4,), (1,): (4,)}, "without its padding is not known"),
    (Pad(0, size="stored", unpadded=9), {(0,): (4,), (1,): (4,)}, "does not fit into 4"),
    (Fused(0, "tp", (Segment(4), Segment(2))), {(0,): (2,), (1,): (2,)}, "gives it \\[3\\]"),
    (Fused(0, "tp", (Segment(), Segment())), {(0,): (3,), (1,): (3,)}, "tp=0 holds \\[3\\]"),
    (
        Fused(0, "tp", (Segment(), Segment(None, "replicate"))),
        {(0,): (3,), (1,): (3,)},
        "give the width of every replicated",
    ),
    (
        Fused(0, "tp", (Segment(2), Segment(sizes="stored"))),
        {(0,): (3,), (1,): (3,)},
        "give the sizes of every segment",
    ),
    (Gather(0, "tp", ((0,), (1,), (2,))), {(0,): (1,), (1,): (1,)}, "blocks of 3 positions"),
    (Expert(0, "tp", ((0,), (1,))), {(0,): (1,), (1,): (2,)}, "tp=1 holds \\[2\\]"),
    (Refused("secret"), {(0,): (1,), (1,): (1,)}, "is not known: secret"),
]


@pytest.mark.parametrize(("layout", "shapes", "message"), FITTED, ids=range(len(FITTED)))
def test_shapes_that_do_not_fit_name_coordinate_and_shapes(
    layout: Layout, shapes: dict[tuple[int, ...], tuple[int, ...]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        layout.logical_shape(shapes, TP)
    local = {at: Local(0, 0, shape) for at, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=f"(?s)x cannot be put together: .*{message}"):
        gather("x", layout, TP, local, torch.float32)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Shard(1, "tp"), "has no dimension 1"),
        (Shard(-1, "tp"), "has no dimension -1"),
        (Shard(0, "tp", "stored"), "nothing is stored yet"),
        (Pad(0, size="stored"), "nothing is stored yet"),
        (Pad(0, size=4), "has length 5: it does not fit into 4"),
        (Pad(0, multiple=4, unpadded=6), "has length 5: it should be 6"),
        (Fused(0, "tp", (Segment(), Segment())), "has length 5: it is not made of the 2 segments"),
        (Fused(0, "tp", (Segment(7), Segment())), "it is not made of the 2 segments"),
        (Gather(0, "tp", ((0,), (1,))), "not made of the 2 equal blocks"),
        (Expert(0, "tp", ((0,), (1,))), "places 2 of 5 experts"),
        (Owner({"tp": 2}), "outside of the mesh tp=2"),
        (Owner({"pp": 0}), "has no axis 'pp'"),
        (Average("pp"), "has no axis 'pp'"),
    ],
    ids=str,
)
def test_a_tensor_that_a_layout_does_not_fit_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layout.place((5,), TP, (0,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: StridedShard(0, "tp", 0),
        lambda: Fused(0, "tp", ()),
        lambda: Gather(0, "tp", ((0,), (2,))),
        lambda: Gather(0, "tp", ((), ())),
        lambda: Pad(0),
        lambda: Pad(0, multiple=2, size=4),
        lambda: Pad(0, multiple=0),
        lambda: Pad(0, size=4, axis="tp"),
        lambda: Mesh({"tp": 0}),
        lambda: Mesh({"tp": 2}, ("pp",)),
        lambda: Mesh({"tp": 2}).at(tp=2),
        lambda: Mesh({"tp": 2}).rank((2,)),
        lambda: Mesh({"tp": 2}).rank((0, 0)),
        lambda: Mesh({"tp": 2}).coordinate(2),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError):
        make()


def test_ranks_are_numbered_in_the_order_of_the_mesh() -> None:
    mesh = Mesh({"tp": 2, "pp": 3}, order=("pp", "tp"))
    assert [mesh.rank(mesh.coordinate(rank)) for rank in range(6)] == list(range(6))
    assert mesh.coordinate(1) == (1, 0)
    assert mesh.rank(mesh.at(pp=2)) == 4
    assert sorted(mesh.coordinates()) == sorted(map(mesh.coordinate, range(6)))
    assert (Mesh({}).ranks, Mesh({}).coordinates(), Mesh({}).rank(())) == (1, [()], 0)


def test_the_known_shape_is_compared() -> None:
    local = {at: Local(0, 0, (2,)) for at in TP.coordinates()}
    assert gather("x", Shard(0, "tp"), TP, local, torch.float32, shape=(4,)).shape == (4,)
    with pytest.raises(CheckpointError, match="x is of \\[4\\]: it should be \\[5\\]"):
        gather("x", Shard(0, "tp"), TP, local, torch.float32, shape=(5,))


def test_copies_that_are_cut_in_different_places_are_found() -> None:
    mesh = Mesh({"tp": 2, "dp": 2})
    layout = Chain((Gather(0, "tp", ((0, 1, 2), (1,))), Shard(0, "dp")))
    local = {
        at: Local(i, 0, layout.place((6,), mesh, at).shape)
        for i, at in enumerate(mesh.coordinates())
    }
    atom = gather("x", layout, mesh, local, torch.float32)
    assert atom.shape == (6,)
    assert atom.replicas is not None
    assert int(atom.replicas.boxes.volume.sum()) == 2


def test_copies_are_averaged_only_on_demand(tmp_path: object) -> None:
    folder = tmp_path
    copies = torch.tensor([[1.0, 2.0, 3.5], [2.0, 6.0, 3.5]])
    (folder / "copies").write_bytes(copies.numpy().tobytes())  # type: ignore[operator]
    files = Files(folder, ["copies"])  # type: ignore[arg-type]
    local = {(rank,): Local(0, rank * 12, (3,)) for rank in range(2)}
    with pytest.raises(CheckpointError, match="x is the mean of copies that differ"):
        gather("x", Average("tp"), TP, local, torch.float32)
    atom = gather("x", Average("tp"), TP, local, torch.float32, lossy=True)
    assert mean("x", atom, files).tolist() == [1.5, 4.0, 3.5]
    uneven = gather(
        "x",
        Shard(0, "tp"),
        TP,
        {at: t._replace(shape=(1,)) for at, t in local.items()},
        torch.int32,
    )
    with pytest.raises(CheckpointError, match="x cannot be averaged"):
        mean("x", uneven, files)
