"""Full disks, limits, sources that cannot be written or that change while they are read."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoints import convert
from core.errors import CheckpointError
from core.testing.fixtures import make_run, plugin_of
from core_ucp.plugin import Plugin

Core = Callable[..., Any]


@pytest.fixture(name="large", scope="module")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 1.2 MB of tensors."""
    path = tmp_path_factory.mktemp("large") / "large.pt"
    torch.save({f"w{i}": torch.randn(100_000) for i in range(3)}, path)
    return path


# Targets


@pytest.mark.parametrize("to", ["universal", "huggingface", "torch-dcp", "megatron"])
def test_a_full_disk_is_one_clear_error(core: Core, large: Path, disks: Any, to: str) -> None:
    disk = disks.tmpfs(600)
    said = core("convert", large, disk / "deep" / "out", "--to", to).error
    assert str(disk) in said
    assert "No space left on device" in said
    assert "free space or choose another disk" in said
    assert [path.name for path in disk.rglob("*")] == ["deep"]


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


@pytest.mark.parametrize("to", ["universal", "torch-dcp"])
def test_a_limit_on_the_size_of_files_is_one_clear_error(
    large: Path, tmp_path: Path, to: str
) -> None:
    call = [sys.executable, "-m", "core", "convert", str(large), str(tmp_path / "out"), "--to", to]
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limited,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_created_is_one_clear_error(
    core: Core, saved: Any, disks: Any
) -> None:
    disk = disks.tmpfs(600)
    disks.read_only(disk)
    said = core("convert", saved.full, disk / "out", "--to", "universal").error
    assert f"cannot create {disk / 'out'}: Read-only file system" in said


# Sources


@pytest.mark.parametrize("form", ["full", "dcp", "universal"])
def test_a_source_is_only_read(
    core: Core, saved: Any, disks: Any, tmp_path: Path, form: str
) -> None:
    disk, source = disks.tmpfs(600), getattr(saved, form)
    place = disk / source.name
    if source.is_dir():
        shutil.copytree(source, place)
    else:
        shutil.copy(source, place)
    disks.read_only(disk)
    for command in ("inspect", "verify"):
        assert core("ucp", command, place).code == 0
    for to in ("universal", "deepspeed"):
        assert core("convert", place, tmp_path / to, "--to", to).code == 0
        assert core("ucp", "diff", source, tmp_path / to).code == 0


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)


def halve(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [grow, rewrite, halve, remove])
@pytest.mark.parametrize("to", ["universal", "dcp"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    large: Path, tmp_path: Path, change: Callable[[Path], None], to: str
) -> None:
    source = tmp_path / "in.pt"
    shutil.copy(large, source)
    changed: list[str] = []

    def disturb(name: str, size: int) -> None:
        if not changed:
            changed.append(name)
            change(source)

    with make_run(tmp_path / "run", plugins=plugin_of(Plugin(), "ucp")) as run:
        conversion = convert.plan(source, tmp_path / "out", to, run)
        with pytest.raises(CheckpointError) as caught:
            convert.execute(conversion, disturb)
    assert changed
    assert str(source) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"in.pt", "run"}


def test_a_source_that_changes_between_plan_and_copy_is_refused(
    large: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.pt"
    shutil.copy(large, source)
    with make_run(tmp_path / "run", plugins=plugin_of(Plugin(), "ucp")) as run:
        conversion = convert.plan(source, tmp_path / "out", "universal", run)
        rewrite(source)
        with pytest.raises(CheckpointError, match="was changed while it was read"):
            convert.execute(conversion)
    assert not (tmp_path / "out").exists()
