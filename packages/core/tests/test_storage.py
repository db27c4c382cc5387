"""Sinks of several ranks share a folder; a finished folder appears at once or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.errors import CheckpointError
from core.storage import FileSink, FileSource, new_folder, publish


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was synced, in order."""
    names: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_several_sinks_fill_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    sinks = [FileSink(folder) for _ in range(2)]
    for rank, sink in enumerate(sinks):
        sink.open(f"rank-{rank}", 1)
        sink.write_at(f"rank-{rank}", 0, b"x")
    for sink in sinks:
        sink.commit()
    assert contents(tmp_path) == {"new/out/rank-0": b"x", "new/out/rank-1": b"x"}


def test_commit_syncs_files_and_folder(tmp_path: Path, synced: list[str]) -> None:
    sink = FileSink(tmp_path / "out")
    sink.open("data", 3)
    sink.commit()
    assert synced == ["data", "out"]


def test_abort_removes_its_own_files_only(tmp_path: Path) -> None:
    first, second = FileSink(tmp_path), FileSink(tmp_path)
    first.open("first", 1)
    second.open("second", 1)
    with pytest.raises(CheckpointError, match="File exists"):
        second.open("first", 1)
    second.abort()
    first.commit()
    first.abort()
    assert contents(tmp_path) == {"first": b"\0"}


def test_abort_after_a_failed_commit_removes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    sink = FileSink(tmp_path)
    sink.open("data", 1)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        sink.commit()
    sink.abort()
    assert contents(tmp_path) == {}


def test_a_file_that_was_never_opened_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'absent' is not open"):
        FileSink(tmp_path).write_at("absent", 0, b"x")


def test_a_source_that_nobody_closes_closes_itself(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        FileSource(tmp_path).read_into("data", 0, bytearray(1))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_new_folder_appears_whole_and_durable(tmp_path: Path, synced: list[str]) -> None:
    final = tmp_path / "parent" / "out"
    with new_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "inner").write_bytes(b"in")
        (folder / "data").write_bytes(b"out")
        assert not final.exists()
    assert contents(final) == {"data": b"out", "sub/inner": b"in"}
    assert set(synced) == {"data", "sub", "inner", folder.name, "parent"}
    assert synced[-1] == "parent"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "data").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_target_stays(tmp_path: Path) -> None:
    taken, link = tmp_path / "taken", tmp_path / "link"
    taken.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    for final in (taken, link):
        with pytest.raises(CheckpointError, match="exists already"), new_folder(final):
            pass
        with pytest.raises(CheckpointError, match="exists already"):
            publish(tmp_path, final)
    with pytest.raises(CheckpointError, match="exists already"), new_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "link", "taken"]


def test_a_refusing_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Not a directory"), new_folder(tmp_path / "file/out"):
        pass
    with pytest.raises(CheckpointError, match="cannot create"):
        FileSink(tmp_path / "file" / "out")
