"""A disk that is full: an error with needed and free bytes, the checkpoint before it untouched."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_fastpersist import WriteOptions, load, save

MODES = ["copy, process", "copy, thread", "live"]
FORMATS = ["fastpersist", "fastpersist-safetensors"]
NUMBERS = re.compile(r"[\d,]+ bytes are needed, [\d,]+ are free")
each_mode = pytest.mark.parametrize("mode", MODES)
each_format = pytest.mark.parametrize("format", FORMATS)


def require_untouched(training: Any, digest: str, tools: Any) -> None:
    """The checkpoint of step 1 is the newest one, whole, and nothing else is there."""
    folder = training.folder / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000001"]
    assert not tools.temporaries(folder)
    kept = training.digest()
    state = {"all": [training.model.state_dict(), training.optimizer.state_dict()]}
    before = [tensor.clone() for tensor in tools.leaves(state)]
    training.spoil()
    assert training.load().step == 1
    assert training.digest() == digest
    assert kept != digest
    for tensor, value in zip(tools.leaves(state), before, strict=True):
        tensor.copy_(value)


@each_format
@each_mode
def test_no_room_at_any_moment_of_a_checkpoint(
    mode: str, format: str, disks: Any, training: Callable[..., Any], tools: Any
) -> None:
    disk = disks.tmpfs(8 * 1024)
    trained = training(mode, disk / "run", checkpoint={"keep": 0, "format": format})
    first = trained.digest()
    trained.save(1).durable()
    used = tools.free(disk)
    complaints: list[str] = []
    needed = sum(-(-p.stat().st_size // 4096) for p in disk.rglob("step-*1/*"))
    trained.step()
    for blocks in range(needed + 3):
        if 2 < blocks < needed - 6:
            continue  # nothing but a part of the data would fit
        tools.fill(disk, leave=blocks * 4096)
        pending = trained.save(2)
        try:
            pending.durable()
        except CheckpointError as error:
            complaints.append(str(error))
            require_untouched(trained, first, tools)
        else:
            break
        finally:
            (disk / "ballast").unlink(missing_ok=True)
    else:
        raise AssertionError(f"never enough: {complaints}")
    assert tools.free(disk) < used
    for text in complaints:
        # What core itself writes is its manifest, and it tells the system's error.
        assert NUMBERS.search(text) or "[Errno 28] No space left" in text or MANIFEST in text, text
    phases = {word for text in complaints for word in PHASES[format] if word in text}
    if any("[Errno 28]" in text for text in complaints):
        phases.add(MANIFEST)
    assert phases == set(PHASES[format]), complaints
    expected = trained.digest()
    trained.spoil()
    assert trained.load().step == 2
    assert trained.digest() == expected


MANIFEST = "manifest.json"
PHASES = {
    "fastpersist": [".distcp", ".distcp.xxh3.json", ".metadata.xxh3.json", "/.metadata", MANIFEST],
    "fastpersist-safetensors": [".safetensors", MANIFEST],
}
"""What the complaints name, for the disk is full at every moment of a save once."""


@each_format
@each_mode
def test_no_room_in_the_middle_of_the_data(
    mode: str, format: str, disks: Any, training: Callable[..., Any], tools: Any
) -> None:
    """A file system that cannot reserve: its disk is found to be full when most is written."""
    disk = disks.ext4(16, "-O", "^extents,^64bit,^metadata_csum,^has_journal")
    trained = training(mode, disk / "run", checkpoint={"keep": 0, "format": format})
    first = trained.digest()
    trained.save(1).durable()
    trained.step()
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(tools.free(disk) - 20 * 4096))
    with pytest.raises(CheckpointError, match="No space") as error:
        trained.save(2).durable()
    assert NUMBERS.search(str(error.value)), error.value
    require_untouched(trained, first, tools)
    (disk / "ballast").unlink()
    trained.save(2).durable()


@each_mode
def test_a_full_disk_stops_the_next_optimizer_step(
    mode: str, disks: Any, training: Callable[..., Any], tools: Any
) -> None:
    disk = disks.tmpfs(8 * 1024)
    trained = training(mode, disk / "run", checkpoint={"keep": 0})
    first = trained.digest()
    trained.save(1).durable()
    trained.step()
    tools.fill(disk, leave=4096)
    pending = trained.save(2)
    tools.until(lambda: pending.done)
    before = [parameter.clone() for parameter in trained.model.parameters()]
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 failed") as error:
        trained.step()
    assert NUMBERS.search(str(error.value)), error.value
    assert all(map(torch.equal, before, trained.model.parameters()))
    require_untouched(trained, first, tools)


def test_a_full_disk_is_told_at_the_next_submit_too(
    disks: Any, training: Callable[..., Any], tools: Any
) -> None:
    disk = disks.tmpfs(8 * 1024)
    trained = training("copy, process", disk / "run", checkpoint={"keep": 0})
    trained.save(1).durable()
    tools.fill(disk, leave=4096)
    trained.save(2)
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 failed"):
        trained.save(3)
    (disk / "ballast").unlink()
    trained.save(3).durable()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("reserving", [True, False])
def test_a_file_that_does_not_fit_leaves_the_one_before(
    name: str, reserving: bool, disks: Any, tools: Any
) -> None:
    disk = disks.ext4(24, *([] if reserving else ["-O", "^extents,^64bit,^metadata_csum"]))
    before = {"w": torch.randn(100_000)}
    save(before, disk / name)
    free = tools.free(disk)
    options = WriteOptions(chunk=2**20)
    with pytest.raises(CheckpointError, match="No space") as error:
        save({"w": torch.randn(8_000_000)}, disk / name, options=options)
    assert NUMBERS.search(str(error.value)), error.value
    assert [path.name for path in disk.iterdir()] == [name]
    assert tools.free(disk) == free
    assert torch.equal(load(disk / name)["w"], before["w"])


def test_the_sink_that_runs_out_of_room_leaves_nothing(disks: Any, tools: Any) -> None:
    from core_fastpersist.storage import DirectSink

    disk = disks.ext4(24, "-O", "^extents,^64bit,^metadata_csum,^has_journal")
    sink = DirectSink(disk / "out")
    tools.fill_slowly(disk, leave=2**20)
    sink.open("data", 4 * 2**20)
    data = torch.ones(2**20).numpy().tobytes()
    with pytest.raises(CheckpointError, match="No space"):
        sink.write_at("data", 0, data)
    sink.abort()
    assert not list((disk / "out").iterdir())


# Limits of a process


def saves_beyond_a_limit(tools: Any, folder: str, mode: str) -> None:
    trained = tools.Training(folder, mode, checkpoint={"keep": 0})
    first = trained.digest()
    trained.save(1).durable()
    trained.step()
    data = max(path.stat().st_size for path in trained.folder.rglob("*.distcp"))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    found = {}
    for limit in (data // 2, data - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        tools.end_writer(trained)  # a process has the limits that it was started with
        try:
            trained.save(2).durable()
        except CheckpointError as error:
            found[str(limit)] = str(error)
        assert not tools.temporaries(trained.folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    tools.end_writer(trained)
    trained.spoil()
    assert trained.load().step == 1
    assert trained.digest() == first
    trained.save(2).durable()
    print(json.dumps(found))


@each_mode
def test_a_limit_on_the_size_of_files_is_an_error_like_a_full_disk(
    mode: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    found = child(saves_beyond_a_limit, tmp_path / "run", mode).output()
    assert len(found) == 2
    for text in found.values():
        assert "File too large" in text
        assert NUMBERS.search(text), text


def saves_a_file_beyond_a_limit(tools: Any, folder: str, name: str) -> None:
    path = Path(folder) / name
    before = {"w": torch.randn(100_000)}
    save(before, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        save({"w": torch.randn(1_000_000)}, path)
    except CheckpointError as error:
        assert [each.name for each in path.parent.iterdir()] == [name]
        assert torch.equal(load(path)["w"], before["w"])
        print(json.dumps(str(error)))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_limit_on_the_size_of_files_leaves_the_file_before(
    name: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    found = child(saves_a_file_beyond_a_limit, tmp_path / "out", name).output()
    assert "File too large" in found
    assert NUMBERS.search(found), found
