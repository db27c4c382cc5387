"""What ``core doctor`` says of a disk and a machine, good ones and bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import core
from core import Reading
from core.testing.fixtures import make_run, plugin_of
from core_fastpersist import host, probes
from core_fastpersist.direct.alignment import Alignment
from core_fastpersist.plugin import Plugin, direct_io


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Iterator[core.Run]:
    with make_run(tmp_path / "run", plugins=plugin_of(Plugin(), "fastpersist")) as started:
        yield started


def look(run: core.Run) -> dict[str, Reading]:
    return {reading.name: reading for reading in direct_io(run)}


def test_a_disk_and_a_machine_are_described(run: core.Run) -> None:
    found = look(run)
    expected = {"direct I/O", "speed class", "free memory", "lockable memory", "writer process"}
    assert expected <= set(found)
    assert all(reading.status in ("ok", "warn") for reading in found.values())


def test_nothing_is_left_on_the_disk(run: core.Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    look(run)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_direct_io_is_a_warning_with_the_reason(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Alignment(direct=False, reason="the file system has no direct I/O")
    monkeypatch.setattr(probes, "alignment_of", lambda folder: nothing)
    found = look(run)
    reading = found["direct I/O"]
    assert reading.status == "warn"
    assert "the file system has no direct I/O" in str(reading.value)
    assert reading.advice
    assert "direct write" not in found
    assert "buffered write and fsync" in found


def test_a_folder_that_cannot_be_written_is_a_failure(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probes, "_speed", refuses)
    reading = look(run)["speed"]
    assert (reading.status, reading.value) == ("fail", "Permission denied")
    assert reading.advice


def test_a_writer_process_that_does_not_start_is_a_warning(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    reading = look(run)["writer process"]
    assert reading.status == "warn"
    assert "No such file" in str(reading.value)
    assert 'set `fastpersist.writer` to "thread"' in reading.advice


def test_a_writer_process_that_dies_is_a_warning(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert look(run)["writer process"].status == "warn"


def test_a_budget_above_the_free_memory_is_a_warning(tmp_path: Path) -> None:
    plugins = plugin_of(Plugin(), "fastpersist")
    with make_run(tmp_path / "run", plugins=plugins, fastpersist={"memory": 1e6}) as run:
        reading = look(run)["free memory"]
    assert (reading.status, "1e+06 GiB" in reading.limit) == ("warn", True)
    assert reading.advice


@pytest.mark.parametrize(
    ("speed", "words"),
    [(0.01, "spinning"), (0.2, "SATA"), (0.7, "an NVMe"), (3.0, "fast NVMe"), (26.0, "several")],
)
def test_speed_classes(speed: float, words: str) -> None:
    assert words in probes.speed_class(speed)


def test_free_memory_is_that_of_the_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   80 kB\n")
    assert host.available_memory(tmp_path, tmp_path) == 80 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1024\n")
    assert host.available_memory(tmp_path, tmp_path) == 80 * 1024
    (tmp_path / "memory.max").write_text("4096\n")
    assert host.available_memory(tmp_path, tmp_path) == 3072
    assert host.available_memory(tmp_path / "absent", tmp_path / "absent") > 2**20
