"""Where ranks run, and which of the ranks that hold the same bytes write them.

The rules are those of FastPersist (arXiv 2406.13768), read from its implementation in DeepSpeed.
Machines and sockets are read from the operating system instead of being computed from ranks.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from core.errors import CheckpointError, closest

Writers: TypeAlias = Literal["none", "replica", "socket", "machine"]
"""Who writes what several ranks hold: the first of them alone (``none``), all of them
(``replica``), or one per CPU socket or per machine."""

Peers: TypeAlias = tuple[int, ...]
"""Ranks that hold the same bytes."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Args:
        machine: tells machines apart.
        sockets: the CPU sockets that the process may run on, ascending.
    """

    machine: str
    sockets: tuple[int, ...] = (0,)


def here(root: Path = Path("/")) -> Place:
    """The place of this process, as Linux tells it.

    Where the system does not tell, the machine is its host name and has one socket.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    packages = _packages(root)
    allowed = cast(
        "Callable[[int], set[int]] | None",
        getattr(os, "sched_getaffinity", None),  # Linux alone has it
    )
    cpus = allowed(0) if allowed else set(packages)
    sockets = {packages[cpu] for cpu in cpus if cpu in packages}
    return Place(_machine(root), tuple(sorted(sockets)) or (0,))


@cache
def _machine(root: Path) -> str:
    return _text(root / "proc/sys/kernel/random/boot_id") or platform.node()


@cache
def _packages(root: Path) -> Mapping[int, int]:
    """The socket of every CPU."""
    found: dict[int, int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        package = _text(folder / "topology/physical_package_id")
        if package.lstrip("-").isdecimal():
            found[int(folder.name.removeprefix("cpu"))] = int(package)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def checked(writers: str) -> Writers:
    """The unit of that name.

    Raises:
        CheckpointError: when there is none.
    """
    known = get_args(Writers)
    if writers not in known:
        raise CheckpointError(
            f"there are no writers called {writers!r}{closest(writers, known)}",
            fix=f"choose one of {', '.join(known)}",
        )
    return cast("Writers", writers)


def writing_ranks(
    unit: Writers, slices: Sequence[Sequence[int]], places: Sequence[Place]
) -> list[Peers]:
    """Choose the ranks that write each slice of a model.

    For ``socket`` and ``machine`` these resources are dealt to the slices in equal runs, and on
    each resource of its run the first peer that lives there writes the slice. With more slices
    than ranks on a resource, a slice has its run from the resources of its own peers. A slice
    whose resources hold none of its peers is written by its first peer.

    Args:
        unit: who writes.
        slices: for every slice the ranks that hold it, in ascending order; slices share no rank.
            Those of one pipeline stage follow each other.
        places: where every rank runs.

    Returns:
        For every slice its writing ranks, in order of the ranges that they write.
    """
    if unit == "none":
        return [(peers[0],) for peers in slices]
    if unit == "replica":
        return [tuple(peers) for peers in slices]
    homes = _resources(unit, places)
    count = max(homes) + 1
    per_unit = max(1, len(places) // count)
    chosen: list[Peers] = []
    for index, peers in enumerate(slices):
        if len(slices) > per_unit:
            run = _run([homes[peer] for peer in peers], index % per_unit, per_unit)
        else:
            run = _run(range(count), index, len(slices))
        chosen.append(_first_on_each(run, peers, homes) or (peers[0],))
    return chosen


def _run(resources: Sequence[int], index: int, runs: int) -> Sequence[int]:
    """Run ``index`` of ``runs`` about equal ones; one entry serves several where there are few."""
    start = index * len(resources) // runs
    return resources[start : max(start + 1, (index + 1) * len(resources) // runs)]


def _first_on_each(run: Iterable[int], peers: Sequence[int], homes: Sequence[int]) -> Peers:
    first = {homes[peer]: peer for peer in reversed(peers)}
    return tuple(first[resource] for resource in dict.fromkeys(run) if resource in first)


def _resources(unit: Writers, places: Sequence[Place]) -> list[int]:
    """The machine or socket of every rank, counted in order of the lowest rank on each."""
    if unit == "machine":
        return _numbered(place.machine for place in places)
    return _numbered(zip((place.machine for place in places), _sockets(places), strict=True))


def _sockets(places: Sequence[Place]) -> list[int]:
    """One socket for every rank.

    Ranks that are free to run on several are dealt to these in equal runs, as launchers number
    them along the devices of a machine.
    """
    alike = Counter(places)
    before: Counter[Place] = Counter()
    sockets: list[int] = []
    for place in places:
        sockets.append(place.sockets[before[place] * len(place.sockets) // alike[place]])
        before[place] += 1
    return sockets


def _numbered(values: Iterable[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def choose(unit: Writers, groups: Iterable[Peers], places: Sequence[Place]) -> dict[Peers, Peers]:
    """Choose the writing ranks of groups of peers, which may share ranks with other groups.

    A state can be cut in several ways at once, such as by pairs of ranks for its weights and not
    at all for its buffers. The groups of one such cut have one size and share no rank; they are
    the slices of :func:`writing_ranks`, in order of their lowest rank.
    """
    chosen: dict[Peers, Peers] = {}
    for slices in _cuts(sorted(set(groups))):
        chosen |= zip(slices, writing_ranks(unit, slices, places), strict=True)
    return chosen


def _cuts(groups: Sequence[Peers]) -> list[list[Peers]]:
    cuts: list[tuple[list[Peers], set[int]]] = []
    for peers in groups:
        for slices, taken in cuts:
            if len(slices[0]) == len(peers) and taken.isdisjoint(peers):
                break
        else:
            slices, taken = [], set()
            cuts.append((slices, taken))
        slices.append(peers)
        taken.update(peers)
    return [slices for slices, _ in cuts]
