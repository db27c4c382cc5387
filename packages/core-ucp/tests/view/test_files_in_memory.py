"""Bytes that no file holds are read and copied as if they were in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import CheckpointError
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces


def test_they_are_read_like_all_others(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"abcd")
    files = Files(tmp_path, ["disk"])
    first, second = files.add_bytes("a step", b"12345678"), files.add_bytes("a step", b"xy")
    assert (files.size(first), files.size(second), len(files)) == (8, 2, 3)
    buffer = bytearray(3)
    files.read_into(first, 4, memoryview(buffer))
    assert bytes(buffer) == b"567"
    files.read_into(second, 0, memoryview(buffer)[:2])
    assert bytes(buffer[:2]) == b"xy"
    with pytest.raises(CheckpointError, match="a step is truncated"):
        files.read_into(second, 0, memoryview(buffer))
    files.close()
    files.read_into(first, 0, memoryview(buffer))
    assert bytes(buffer) == b"123"


def test_a_file_on_the_disk_of_the_same_name_is_another(tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"disk")
    files = Files(tmp_path)
    memory, disk = files.add_bytes("name", b"memory"), files.add("name")
    assert (files.size(memory), files.size(disk)) == (6, 4)
    (tmp_path / "name").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        files.require_unchanged()


def test_they_never_change_and_have_an_end(tmp_path: Path) -> None:
    files = Files(tmp_path)
    index = files.add_bytes("a step", b"1234")
    files.require_unchanged()
    files.require("step", Pieces.dense((), index, 0, 4), 4)
    with pytest.raises(CheckpointError, match="a step is truncated"):
        files.require("step", Pieces.dense((2,), index, 0, 4), 4)
