"""Chunks in files: the memory is the file's, a full disk is an error, and a kill leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.errors import CoreError
from core_fpdt.store.file import FileStore

MIB = 2**20
ROW = MIB // 4
"""Floats of a token of one MiB."""


def _blocks(link: Path) -> int:
    return link.stat().st_blocks * 512


def _files(folder: Path) -> list[Path]:
    """Open files of this process that were made in a folder."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if str(folder) in str(link.readlink())]


def _resident(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def test_pages_belong_to_the_file(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    lane = store.lane("keys", range(65), dim=1)
    before = _resident("RssAnon"), _resident("RssFile") + _resident("RssShmem")
    chunk = torch.ones(1, 1, ROW)
    for index in range(64):
        lane.put(index, chunk)
    grown = _resident("RssAnon") - before[0]
    assert _resident("RssFile") + _resident("RssShmem") - before[1] > 56 * MIB
    assert grown < 16 * MIB
    assert store.used() == 64 * MIB
    lane.close()
    assert store.used() == 0
    assert _resident("RssFile") + _resident("RssShmem") - before[1] < 8 * MIB


def test_the_file_has_no_name_and_gives_dropped_chunks_back(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    lane = store.lane("keys", range(9), dim=1)
    for index in range(8):
        lane.put(index, torch.full((1, 1, ROW), float(index)))
    assert list(tmp_path.iterdir()) == []
    (file,) = _files(tmp_path)
    assert _blocks(file) >= 8 * MIB
    for index in range(6):
        lane.drop(index)
    assert _blocks(file) <= 3 * MIB
    assert torch.equal(lane.get(6, 8)[0, :, 0], torch.tensor([6.0, 7.0]))
    lane.put(2, torch.full((1, 1, ROW), 2.0))
    assert _blocks(file) >= 3 * MIB
    assert lane.get(2)[0, 0, -1] == 2.0
    lane.close()
    assert _files(tmp_path) == []


def test_ranges_are_views_of_the_file(tmp_path: Path) -> None:
    lane = FileStore(str(tmp_path)).lane("keys", (0, 2, 4, 5), dim=2)
    whole = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    for index, (begin, end) in enumerate([(0, 2), (2, 4), (4, 5)]):
        lane.put(index, whole[:, :, begin:end])
    found = lane.get(0, 3)
    assert torch.equal(found, whole)
    assert found.data_ptr() == lane.get(0, 1).data_ptr()
    assert found.untyped_storage().filename is not None


def test_a_chunk_outlives_its_lane_in_the_hands_of_a_reader(tmp_path: Path) -> None:
    lane = FileStore(str(tmp_path)).lane("keys", (0, 2), dim=0)
    lane.put(0, torch.ones(2, 4))
    found = lane.get(0)
    lane.close()
    del lane
    assert torch.equal(found, torch.ones(2, 4))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(CoreError, match=r"no chunks can be kept in .*\n  fix: .*fpdt.folder"):
            FileStore(str(folder))


CHILD = """
import resource, signal, sys, torch
from core.errors import CoreError
from core_fpdt.store.file import FileStore

store = FileStore(sys.argv[1])
lane = store.lane("keys", (0, 4, 8), dim=1)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        lane.put(0, torch.ones(1, 4, 2**16))
    except CoreError as error:
        print(error)
        print(store.used())
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        small = store.lane("keys", (0, 4, 8), dim=1)
        small.put(0, torch.ones(1, 4, 8))
        print(small.get(0).sum().item())
else:
    lane.put(0, torch.ones(1, 4, 2**16))
    print("ready", flush=True)
    signal.pause()
"""


def test_a_full_disk_is_an_error_with_numbers_and_no_signal(tmp_path: Path) -> None:
    run = [sys.executable, "-c", CHILD, str(tmp_path), "full"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    first, fix, used, total = done.stdout.splitlines()
    assert first.startswith(
        f"{tmp_path} has no room for 2,097,152 more bytes of chunks: File too large;"
    )
    assert "bytes are free" in first
    assert "fpdt.folder" in fix
    assert (used, total) == ("0", "32.0")


def test_a_kill_leaves_no_file(tmp_path: Path) -> None:
    run = [sys.executable, "-c", CHILD, str(tmp_path), "wait"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir()) == []
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
