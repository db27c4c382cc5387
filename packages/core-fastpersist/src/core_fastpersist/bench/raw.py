"""What the disk itself can do: fio where it is installed, an own loop of direct writes elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core.system import preallocate
from core_fastpersist.direct.alignment import alignment_of, direct_flag
from core_fastpersist.direct.memory import pages

_BLOCK = 16 * 2**20
_THREADS = 2
_FIO_BLOCK = 4 * 2**20
_ENGINES = ("libaio", "psync")


@dataclass(frozen=True)
class Cost:
    """What a save has cost, where it measures itself.

    Args:
        seconds: until it was durable.
        cpu: seconds of processor time.
    """

    seconds: float
    cpu: float


def raw_device(folder: Path, size: int) -> tuple[str, Callable[[Path], Cost | None]]:
    """The raw device of ``folder``: its name, and what writes ``size`` bytes to a new file.

    Raises:
        CheckpointError: where the folder has no direct I/O, so that there is no raw figure.
    """
    found = alignment_of(folder)
    if not found.direct:
        raise CheckpointError(
            f"there is no direct I/O in {folder}", why=found.reason, fix="choose a local disk"
        )
    for engine in _ENGINES if shutil.which("fio") else ():
        if _fio_has(engine, folder):
            return f"raw device (fio {engine})", lambda path: _fio(engine, path, size)
    # Random bytes, written again and again: what they are does not matter, where they lie does.
    block = pages(_BLOCK, touch=True)
    block[: 2**20] = os.urandom(2**20)
    return "raw device (direct writes)", lambda path: _direct(path, size, block, found.offset)


def _direct(path: Path, size: int, block: memoryview, alignment: int) -> None:
    """Write blocks from aligned memory in two threads, as simply as can be."""
    padded = -(-size // alignment) * alignment
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | direct_flag()
    descriptor = os.open(path, flags, 0o600)
    offsets, taking = iter(range(0, padded, _BLOCK)), threading.Lock()

    def work() -> None:
        while True:
            with taking:
                offset = next(offsets, None)
            if offset is None:
                return
            length = min(_BLOCK, padded - offset)
            if os.pwrite(descriptor, block[:length], offset) != length:
                raise CheckpointError(f"the disk took a part of {length:,} bytes only")

    try:
        preallocate(descriptor, padded)
        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(work) for _ in range(_THREADS)]:
                done.result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fio(engine: str, path: Path, size: int) -> Cost:
    job = _run_fio(engine, path, size)
    # fio measures itself, its fsync included: starting it is no part of writing.
    seconds = size / job["write"]["bw_bytes"]
    return Cost(seconds, seconds * (job["usr_cpu"] + job["sys_cpu"]) / 100)


def _run_fio(engine: str, path: Path, size: int) -> Any:
    command = [
        "fio",
        "--name=raw",
        f"--filename={path}",
        f"--size={size // 4096 * 4096}",
        f"--ioengine={engine}",
        "--rw=write",
        f"--bs={min(_FIO_BLOCK, size // 4096 * 4096)}",
        "--iodepth=4",
        "--direct=1",
        "--end_fsync=1",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError("fio failed", why=(done.stderr or done.stdout).strip()[-300:])
    # Remarks may stand before the JSON.
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]


def _fio_has(engine: str, folder: Path) -> bool:
    path = folder / ".fio-trial.tmp"
    try:
        _run_fio(engine, path, _FIO_BLOCK)
    except (CheckpointError, ValueError, LookupError):
        return False
    finally:
        path.unlink(missing_ok=True)
    return True
