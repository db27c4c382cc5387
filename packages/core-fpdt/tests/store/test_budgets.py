"""How much memory there is for chunks, and what is said when it does not do."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given, strategies as st

from core.errors import CoreError
from core_fpdt.store.budget import (
    SHARE,
    Budget,
    cgroup_room,
    disk_budget,
    host_budget,
    longest_that_fits,
    ranks_here,
)

GIB = 2**30


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    _write(tmp_path, memory__max="max", memory__current=1)
    _write(tmp_path / "pod", memory__max=8 * GIB, memory__current=5 * GIB)
    _write(
        tmp_path / "pod" / "job",
        memory__max=6 * GIB,
        memory__current=4 * GIB,
        memory__stat=f"anon 1\ninactive_file {GIB}\n",
    )
    own = tmp_path / "own"
    own.write_text("0::/pod/job\n")
    assert cgroup_room(tmp_path, own) == 3 * GIB
    own.write_text("0::/pod\n")
    assert cgroup_room(tmp_path, own) == 3 * GIB
    _write(tmp_path / "pod" / "job", memory__max=4 * GIB)
    own.write_text("0::/pod/job\n")
    assert cgroup_room(tmp_path, own) == GIB


def test_groups_of_version_one(tmp_path: Path) -> None:
    _write(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/job\n0::/\n")
    assert cgroup_room(tmp_path, own) > 2**60
    _write(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"inactive_file 5\ntotal_inactive_file {GIB}\n",
    )
    assert cgroup_room(tmp_path, own) == 2 * GIB


def test_groups_that_cannot_be_read_are_no_limit(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("nonsense\n")
    _write(tmp_path, memory__max="soon", memory__current=1)
    assert cgroup_room(tmp_path, own) == cgroup_room(tmp_path, tmp_path / "missing") == 2**63


def test_more_used_than_allowed_is_no_room(tmp_path: Path) -> None:
    _write(tmp_path, memory__max=1, memory__current=2)
    assert cgroup_room(tmp_path, tmp_path / "missing") == 0


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 10 * GIB}))
    assert host_budget(ranks=1).available <= SHARE * 10 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_budget().available == host_budget(ranks=4).available
    assert abs(4 * host_budget().available - host_budget(ranks=1).available) < 4
    assert host_budget(1.5).available == int(1.5 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert ranks_here() == 1


def test_a_disk_has_what_is_free(tmp_path: Path) -> None:
    budget = disk_budget(str(tmp_path), ranks=2)
    assert 0 < budget.available <= psutil.disk_usage(str(tmp_path)).free
    assert str(tmp_path) in budget.where


def test_a_sequence_that_does_not_fit_is_refused_with_one_that_does() -> None:
    budget = Budget(4 * GIB, "host memory", "raise fpdt.host_memory")
    budget.require(lambda tokens: tokens * 2**20, 4096)
    with pytest.raises(CoreError) as caught:
        budget.require(lambda tokens: tokens * 2**20, 6144)
    assert str(caught.value) == (
        "a sequence of 6,144 tokens needs 6 GiB of host memory on each rank: there are 4 GiB; the "
        "longest one that fits has 4,096 tokens\n  fix: take a shorter sequence or more ranks, lower "
        "fpdt.keep_output, switch fpdt.keep_keys off, or raise fpdt.host_memory"
    )


@given(per_chunk=st.integers(1, 50), chunk=st.integers(1, 40), limit=st.integers(0, 500))
def test_the_longest_sequence_that_fits(per_chunk: int, chunk: int, limit: int) -> None:
    def bytes_for(tokens: int) -> int:
        return -(-tokens // chunk) * per_chunk

    available = 300
    fitting = [tokens for tokens in range(limit + 1) if bytes_for(tokens) <= available]
    assert longest_that_fits(bytes_for, limit, available) == max(fitting)
