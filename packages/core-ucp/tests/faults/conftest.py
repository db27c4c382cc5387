"""Commands in processes of their own that stop at a point, and disks that are full or read-only."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Child:
    """A command in a process of its own.

    Attributes:
        process: the process.
        place: file that appears when it has come to the point where it stops.
    """

    process: Any
    place: Path

    def reach(self) -> None:
        """Wait until it has come to its point."""
        end = time.monotonic() + 60
        while not self.place.exists():
            assert self.process.is_alive(), self.end()
            assert time.monotonic() < end, "it did not come to the point"
            time.sleep(0.01)

    def go(self) -> None:
        """Let it go on."""
        self.place.with_suffix(".go").touch()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit status, standard output, standard error."""
        self.process.join(60)
        out, err = (self.place.with_suffix(end).read_text() for end in (".out", ".err"))
        return self.process.exitcode, out, err


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Child]]:
    """Start ``core`` in a process that stops at a point, if it gets there."""
    # Forked from one that has imported everything, so that many cost little.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["core.cli.convert", "core_ucp.conversion", "core_ucp.sources.full"]
    )
    folder = tmp_path_factory.mktemp("points")
    script = str(Path(__file__).with_name("stopping.py"))
    started: list[Child] = []

    def begin(*words: object, point: str = "never") -> Child:
        place = folder / uuid.uuid4().hex[:8]
        given = {"point": point, "place": place, "words": list(map(str, words))}
        process = server.Process(target=runpy.run_path, args=(script, {"given": given}))
        process.start()
        started.append(Child(process, place))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.join()


@dataclass
class Disks:
    """File systems in memory, which go when the test ends."""

    folder: Path
    mounted: list[Path] = field(default_factory=list)

    def tmpfs(self, kib: int) -> Path:
        """A file system of so many KiB."""
        if os.geteuid() != 0:
            pytest.skip("file systems are mounted by root only")
        target = self.folder / f"disk-{len(self.mounted)}"
        target.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(target)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine cannot mount: {done.stderr.strip()}")
        self.mounted.append(target)
        return target

    def read_only(self, target: Path) -> None:
        """Nothing can be written any more."""
        call = ["mount", "-o", "remount,ro", str(target)]
        subprocess.run(call, capture_output=True, check=True)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    made = Disks(tmp_path)
    yield made
    for target in made.mounted:
        subprocess.run(["umount", "-l", target], check=True)
