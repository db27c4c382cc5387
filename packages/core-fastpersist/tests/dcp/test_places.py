"""Ranks know where they run, and the right ones of them write."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from core.errors import CheckpointError
from core_fastpersist.dcp.places import Place, Writers, checked, choose, here, writing_ranks


def cluster(machines: int, ranks: int, sockets: int = 2) -> list[Place]:
    """Machines with some ranks each, which are bound to sockets in equal runs."""
    return [
        Place(f"machine {machine}", (rank * sockets // ranks,))
        for machine in range(machines)
        for rank in range(ranks)
    ]


def grid(world: int, tensor: int, pipeline: int) -> list[tuple[int, ...]]:
    """The peers of every slice, where ranks count through tensor, then data, then pipeline."""
    data = world // tensor // pipeline
    return [
        tuple(stage * data * tensor + peer * tensor + part for peer in range(data))
        for stage in range(pipeline)
        for part in range(tensor)
    ]


def alone(*ranks: int) -> list[tuple[int, ...]]:
    return [(rank,) for rank in ranks]


# Writers per slice, by machines, ranks per machine, tensor and pipeline ranks; two sockets each.
# DeepSpeed's DataParallelWriterFactory chooses the same.
GOLDEN: list[tuple[int, int, int, int, Writers, list[tuple[int, ...]]]] = [
    (1, 8, 1, 1, "machine", [(0,)]),
    (1, 8, 1, 1, "socket", [(0, 4)]),
    (1, 8, 2, 1, "machine", alone(0, 1)),
    (1, 8, 2, 1, "socket", alone(0, 5)),
    (1, 8, 1, 2, "socket", alone(0, 4)),
    (1, 8, 2, 2, "machine", alone(0, 1, 4, 5)),
    (1, 8, 2, 2, "socket", alone(0, 1, 4, 5)),
    (1, 8, 4, 2, "socket", alone(0, 1, 2, 3, 4, 5, 6, 7)),
    (2, 8, 1, 1, "machine", [(0, 8)]),
    (2, 8, 1, 1, "socket", [(0, 4, 8, 12)]),
    (2, 8, 2, 1, "machine", alone(0, 9)),
    (2, 8, 2, 1, "socket", [(0, 4), (9, 13)]),
    (2, 8, 1, 2, "machine", alone(0, 8)),
    (2, 8, 1, 2, "socket", [(0, 4), (8, 12)]),
    (2, 8, 2, 2, "machine", alone(0, 1, 8, 9)),
    (2, 8, 2, 2, "socket", alone(0, 5, 8, 13)),
    (2, 8, 4, 2, "socket", alone(0, 1, 6, 7, 8, 9, 14, 15)),
    (2, 8, 2, 4, "machine", alone(0, 1, 4, 5, 8, 9, 12, 13)),
    (2, 8, 8, 1, "machine", alone(0, 1, 2, 3, 12, 13, 14, 15)),
    (2, 8, 8, 1, "socket", alone(0, 1, 10, 11, 4, 5, 14, 15)),
    (4, 16, 1, 1, "machine", [(0, 16, 32, 48)]),
    (4, 16, 1, 1, "socket", [(0, 8, 16, 24, 32, 40, 48, 56)]),
    (4, 16, 2, 1, "machine", [(0, 16), (33, 49)]),
    (4, 16, 2, 1, "socket", [(0, 8, 16, 24), (33, 41, 49, 57)]),
    (4, 16, 1, 2, "socket", [(0, 8, 16, 24), (32, 40, 48, 56)]),
    (4, 16, 2, 2, "machine", alone(0, 17, 32, 49)),
    (4, 16, 2, 2, "socket", [(0, 8), (17, 25), (32, 40), (49, 57)]),
    (4, 16, 4, 2, "machine", alone(0, 1, 18, 19, 32, 33, 50, 51)),
    (4, 16, 4, 2, "socket", alone(0, 9, 18, 27, 32, 41, 50, 59)),
    (4, 16, 2, 4, "socket", alone(0, 9, 16, 25, 32, 41, 48, 57)),
    (4, 16, 8, 1, "machine", alone(0, 1, 18, 19, 36, 37, 54, 55)),
    (
        4,
        16,
        8,
        2,
        "socket",
        alone(0, 1, 10, 11, 20, 21, 30, 31, 32, 33, 42, 43, 52, 53, 62, 63),
    ),
]


@pytest.mark.parametrize(("machines", "ranks", "tensor", "pipeline", "unit", "expected"), GOLDEN)
def test_the_writers_of_each_slice(
    machines: int,
    ranks: int,
    tensor: int,
    pipeline: int,
    unit: Writers,
    expected: list[tuple[int, ...]],
) -> None:
    slices = grid(machines * ranks, tensor, pipeline)
    assert writing_ranks(unit, slices, cluster(machines, ranks)) == expected


@pytest.mark.parametrize(("machines", "ranks"), [(1, 1), (1, 8), (2, 8), (4, 16), (16, 2), (5, 1)])
def test_pure_data_parallel_writers_follow_from_the_rank(machines: int, ranks: int) -> None:
    world = machines * ranks
    places = cluster(machines, ranks)
    everyone = [tuple(range(world))]
    sockets = min(2 * machines, world)
    closed: dict[Writers, list[int]] = {
        "none": [0],
        "replica": list(range(world)),
        "socket": [rank for rank in range(world) if rank % (world // sockets) == 0],
        "machine": [rank for rank in range(world) if rank % (world // machines) == 0],
    }
    for unit, expected in closed.items():
        assert writing_ranks(unit, everyone, places) == [tuple(expected)]


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2), (8, 2)])
def test_none_and_replica_choose_within_each_slice(tensor: int, pipeline: int) -> None:
    slices, places = grid(16, tensor, pipeline), cluster(2, 8)
    assert writing_ranks("none", slices, places) == [peers[:1] for peers in slices]
    assert writing_ranks("replica", slices, places) == slices


PLACES = st.lists(
    st.builds(
        Place,
        machine=st.sampled_from("abc"),
        sockets=st.sampled_from([(0,), (1,), (0, 1), (0, 1, 2, 3)]),
    ),
    min_size=1,
    max_size=24,
)


@given(PLACES, st.sampled_from(["none", "replica", "socket", "machine"]), st.data())
def test_every_slice_has_writers_among_its_peers_on_any_cluster(
    places: list[Place], unit: Writers, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(places)))
    slices = [tuple(range(start, len(places), count)) for start in range(count)]
    for peers, writers in zip(slices, writing_ranks(unit, slices, places), strict=True):
        assert writers
        assert len(set(writers)) == len(writers)
        assert set(writers) <= set(peers)


@given(PLACES)
def test_one_rank_writes_on_every_machine_and_it_is_the_first(places: list[Place]) -> None:
    everyone = [tuple(range(len(places)))]
    machines = [place.machine for place in places]
    expected = tuple(sorted(machines.index(name) for name in set(machines)))
    assert writing_ranks("machine", everyone, places) == [expected]


def test_ranks_free_to_run_anywhere_are_dealt_to_the_sockets_in_runs() -> None:
    free = [Place("machine", (0, 1))] * 8
    assert writing_ranks("socket", [tuple(range(8))], free) == [(0, 4)]


def test_machines_need_not_hold_ranks_in_order() -> None:
    places = [Place("b"), Place("a"), Place("a"), Place("b"), Place("c")]
    assert writing_ranks("machine", [(0, 1, 2, 3, 4)], places) == [(0, 1, 4)]


def test_groups_of_several_cuts_are_chosen_for_each_cut() -> None:
    """Weights held by ranks of one column, buffers by all, and the two do not count together."""
    places = cluster(2, 2, sockets=1)
    everyone = (0, 1, 2, 3)
    chosen = choose("machine", [(1, 3), everyone, (0, 2), (0, 1), (2, 3)], places)
    assert chosen[everyone] == (0, 2)
    assert [chosen[0, 2], chosen[1, 3]] == [(0,), (3,)]
    assert [chosen[0, 1], chosen[2, 3]] == [(0,), (2,)]


def test_this_process_runs_on_a_machine_and_a_socket() -> None:
    place = here()
    assert place == here()
    assert place.machine
    assert place.sockets


def linux(root: Path, sockets: dict[int, str]) -> Path:
    """A folder with what Linux tells of the machine and of its CPUs."""
    told = root / "proc/sys/kernel/random/boot_id"
    told.parent.mkdir(parents=True)
    told.write_text("29a0a057\n")
    for cpu, socket in sockets.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{socket}\n")
    (root / "sys/devices/system/cpu/cpufreq").mkdir(parents=True)
    return root


def test_the_machine_is_its_boot_and_the_sockets_are_those_of_the_allowed_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = linux(tmp_path, {0: "0", 1: "0", 2: "3", 3: "3"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3}, raising=False)
    assert here(root) == Place("29a0a057", (3,))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2}, raising=False)
    assert here(root) == Place("29a0a057", (0, 3))


def test_without_affinity_a_process_may_run_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert here(linux(tmp_path, {0: "0", 1: "1"})).sockets == (0, 1)


def test_a_system_that_tells_nothing_is_one_socket_of_its_host(tmp_path: Path) -> None:
    assert here(tmp_path) == Place(platform.node(), (0,))


def test_unknown_writers_are_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'socket'(.|\n)*none, replica"):
        checked("sockets")
