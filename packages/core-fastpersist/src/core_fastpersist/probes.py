"""What ``core doctor`` says of this machine: can checkpoints go at the speed of the disk here?"""

from __future__ import annotations

import mmap
import os
import resource
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core import Reading
from core.disk import nearest_existing
from core.errors import CheckpointError
from core_fastpersist.direct.alignment import alignment_of, direct_flag
from core_fastpersist.host import available_memory

if TYPE_CHECKING:
    from core import Run

_BLOCK = 4 * 2**20
_DIRECT = 64 * 2**20
_BUFFERED = 8 * 2**20
_SHARED = 64 * 2**10
_SECONDS = 0.25
"""After this time a trial writes no further block."""

_CLASSES = (
    (5.0, "several NVMe drives"),
    (2.0, "a fast NVMe drive"),
    (0.6, "an NVMe drive"),
    (0.2, "a SATA drive or a network volume"),
    (0.0, "a spinning or a shared disk"),
)
"""Lowest GB/s of each class."""


def disk(run: Run) -> Iterator[Reading]:
    """Direct I/O, its alignment, and the speed, on the mount of the run's folder."""
    folder = nearest_existing(run.folder)
    found = alignment_of(folder)
    yield Reading(
        name="direct I/O",
        status="ok" if found.direct else "warn",
        value=f"works at {folder}" if found.direct else f"impossible at {folder}: {found.reason}",
        advice="" if found.direct else "saves go through the page cache; choose a local disk",
    )
    if found.direct:
        value = f"memory {found.memory}, offset {found.offset}"
        yield Reading(name="alignment", status="ok", value=value, unit="bytes")
    yield from _speeds(folder, found.direct)
    yield _room(folder)


def processes(run: Run) -> Iterator[Reading]:
    """Memory for copies, and whether a writer process can be started over shared memory."""
    from core_fastpersist.settings import FastPersistSettings

    yield _lockable()
    yield _memory(run.settings(FastPersistSettings).memory)
    yield _writer(nearest_existing(run.folder))


def _speeds(folder: Path, direct: bool) -> Iterator[Reading]:
    try:
        buffered = _speed(folder, 0, _BUFFERED)
        past = _speed(folder, direct_flag(), _DIRECT) if direct else None
    except OSError as error:
        advice = "make the folder writable, or choose another"
        yield Reading(name="speed", status="fail", value=error.strerror or "", advice=advice)
        return
    best = max(buffered, past or 0.0)
    limits = ", ".join(f"{name} from {limit:g}" for limit, name in _CLASSES if limit)
    yield Reading(
        name="speed class",
        status="ok",
        value=f"like {speed_class(best)}",
        limit=f"a trial of a quarter of a second; GB/s: {limits}",
    )
    if past is not None:
        yield Reading(name="direct write", status="ok", value=past, unit="GB/s")
    yield Reading(name="buffered write and fsync", status="ok", value=buffered, unit="GB/s")


def speed_class(speed: float) -> str:
    """What a disk that writes ``speed`` GB/s is like.

    Example:
        >>> speed_class(1.2)
        'an NVMe drive'
    """
    return next(name for limit, name in _CLASSES if speed >= limit)


def _speed(folder: Path, flag: int, size: int) -> float:
    """GB/s of writing blocks and an fsync, for at most about a quarter of a second."""
    path = folder / f".fastpersist-{uuid.uuid4().hex[:8]}.tmp"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flag, 0o600)
    try:
        with mmap.mmap(-1, _BLOCK) as block:
            block.write(os.urandom(2**16) * (_BLOCK // 2**16))
            began, written = time.perf_counter(), 0
            while written < size and time.perf_counter() - began < _SECONDS:
                written += os.pwrite(descriptor, block, written)
            os.fsync(descriptor)
            return written / (time.perf_counter() - began) / 1e9
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _room(folder: Path) -> Reading:
    found = os.statvfs(folder)
    free, share = found.f_bavail * found.f_frsize, found.f_bavail / max(found.f_blocks, 1)
    tight = share < 0.05
    return Reading(
        name=f"room on the disk of {folder}",
        status="warn" if tight else "ok",
        value=free / 2**30,
        unit="GiB",
        advice="a nearly full disk writes slowly; free some" if tight else "",
    )


def _lockable() -> Reading:
    """Page-locked memory, which a GPU copies into while training goes on."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    return Reading(
        name="lockable memory",
        status="ok",
        value="unlimited" if unlimited else soft / 2**20,
        unit="" if unlimited else "MiB",
        limit="of `ulimit -l`; CUDA locks its own way and seldom asks for it",
    )


def _memory(budget: float) -> Reading:
    """Free memory: a staged copy of a checkpoint takes as much as the checkpoint."""
    free = available_memory() / 2**30
    tight = free < max(budget, 1.0)
    wanted = f"`fastpersist.memory` wants {budget:g} GiB" if budget else "half of it is for copies"
    advice = "lower `fastpersist.memory`, or use mode `live`, which copies little"
    return Reading(
        name="free memory",
        status="warn" if tight else "ok",
        value=free,
        unit="GiB",
        limit=wanted,
        advice=advice if tight else "",
    )


def _writer(folder: Path) -> Reading:
    """Have a real writer process write a block of shared memory to a file."""
    reason = ""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fastpersist-") as name:
            _write_beside(Path(name) / "block")
    except (OSError, CheckpointError) as error:
        reason = str(error)
    advice = 'set `fastpersist.writer` to "thread", which competes with training'
    return Reading(
        name="writer process",
        status="warn" if reason else "ok",
        value=reason or "starts, shares memory, writes",
        advice=advice if reason else "",
    )


def _write_beside(path: Path) -> None:
    from core_fastpersist.direct.pieces import HostBytes, Piece
    from core_fastpersist.direct.remote import ProcessCarrier, SharedArena

    arena = SharedArena(_SHARED)
    try:
        arena.view[:] = os.urandom(_SHARED)
        carrier = ProcessCarrier(arena)
        try:
            carrier.write(path, _SHARED, [Piece(0, HostBytes(arena.view))])
        finally:
            carrier.close()
        if memoryview(path.read_bytes()) != arena.view:
            raise CheckpointError("it wrote something else than it was given")
    finally:
        arena.close()
