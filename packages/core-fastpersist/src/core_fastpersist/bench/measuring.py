"""Interleaved measurements: every repetition runs all methods once, in an order of its own."""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import CheckpointError
from core_fastpersist.bench.raw import Cost

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Figures:
    """All repetitions of one method.

    Args:
        size: bytes that each moved.
        costs: one for each repetition.
    """

    size: int
    costs: tuple[Cost, ...]

    @property
    def speed(self) -> float:
        """Median, in GB/s (1e9 bytes)."""
        return self.size / statistics.median(cost.seconds for cost in self.costs) / 1e9

    @property
    def best(self) -> float:
        """Fastest, in GB/s."""
        return self.size / min(cost.seconds for cost in self.costs) / 1e9

    @property
    def cpu(self) -> float:
        """Median processor seconds for 1e9 bytes, user and system, children included."""
        return statistics.median(cost.cpu for cost in self.costs) / self.size * 1e9

    def faster_than(self, other: Figures) -> float:
        """Median over the repetitions of how many times faster this was in the same one."""
        pairs = zip(self.costs, other.costs, strict=True)
        return statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs)


def interleave(
    methods: Mapping[str, Callable[[Path], object]],
    size: int,
    folder: Path,
    repeats: int,
    *,
    seed: int = 0,
    before: Mapping[str, Path] | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, Figures]:
    """Measure methods in turn, the order shuffled anew for each repetition.

    Args:
        methods: by name; each gets a path, and returns a :class:`Cost` if it measures itself.
        size: bytes that each moves.
        folder: on the disk in question.
        repeats: repetitions.
        seed: of the order.
        before: for loads, what each method reads: it is dropped from the page cache first. Without
            it each method gets a new path, and what it leaves there is removed.
        tell: is told what runs.
    """
    order = random.Random(seed)
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    for repeat in range(repeats):
        gc.collect()
        names = order.sample(sorted(methods), len(methods))
        for name in names:
            with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as place:
                path = Path(place) / "saved" if before is None else before[name]
                if before is not None:
                    drop(path)
                cost = timed(methods[name], path)
            costs[name].append(cost)
            speed = size / cost.seconds / 1e9
            tell(f"{repeat + 1}/{repeats} {name}: {speed:.2f} GB/s")
    return {name: Figures(size, tuple(found)) for name, found in costs.items()}


def timed(method: Callable[[Path], object], path: Path) -> Cost:
    """Run a method once."""
    cpu, began = processor_seconds(), time.perf_counter()
    result = method(path)
    seconds = time.perf_counter() - began
    own = Cost(seconds, processor_seconds() - cpu)
    return result if isinstance(result, Cost) else own


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def drop(path: Path) -> None:
    """Drop a file, or all files of a folder, from the page cache; they must be synced."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def require_room(folder: Path, size: int, copies: Sequence[str]) -> None:
    """Refuse a benchmark that would fill the disk.

    Raises:
        CheckpointError: with needed and free bytes.
    """
    needed, free = size * (len(copies) + 2), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the benchmark needs {needed:,} bytes in {folder}",
            why=f"{free:,} are free",
            fix="choose a smaller state or another folder",
        )
