"""``verify`` names file and chunk of every damage, at every kind of byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

from core.errors import CheckpointError
from core.testing.fixtures import make_run, plugin_of
from core_fastpersist.coverage import SUFFIX, digests_of
from core_fastpersist.dcp.native import NativeWriter
from core_fastpersist.dcp.shards import SafetensorsWriter
from core_fastpersist.dcp.staging import Staging
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.plugin import Plugin
from core_fastpersist.verification import Finding, verify

CHUNK = 4096
STATE = {"w": torch.arange(9000.0), "step": torch.tensor(3), "b": torch.ones(7, 11)}


def save_dcp(folder: Path) -> Path:
    """A DCP folder with several chunks; returns its data file."""
    staging = Staging(mode="copy", writer="thread", options=WriteOptions(chunk=CHUNK))
    dcp.save(dict(STATE), storage_writer=NativeWriter(folder, staging), no_dist=True)
    (data,) = folder.glob("*.distcp")
    return data


def save_safetensors(folder: Path) -> Path:
    """A safetensors file with several chunks."""
    from core_fastpersist.files.storing import save

    folder.mkdir()
    save(STATE, folder / "x.safetensors", options=WriteOptions(chunk=CHUNK))
    return folder / "x.safetensors"


def save_shards(folder: Path) -> Path:
    """A safetensors file of DCP with several chunks."""
    staging = Staging(mode="copy", writer="thread", options=WriteOptions(chunk=CHUNK))
    dcp.save(dict(STATE), storage_writer=SafetensorsWriter(folder, staging), no_dist=True)
    (data,) = folder.glob("*.safetensors")
    return data


KINDS: dict[str, Callable[[Path], Path]] = {
    "dcp": save_dcp,
    "safetensors": save_safetensors,
    "shards": save_shards,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def damages(path: Path) -> list[Finding]:
    return [found for found in verify(path) if found.status == "fail"]


@each_kind
def test_a_sound_checkpoint_has_no_damage(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind](tmp_path / "saved")
    found = verify(data.parent)
    assert {finding.status for finding in found} == {"ok"}
    assert data in {finding.file for finding in found}
    assert [finding.status for finding in verify(data)] == ["ok"]


@each_kind
def test_every_damaged_chunk_is_named(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind](tmp_path / "saved")
    digests = digests_of(data)
    assert digests is not None
    ranges = list(digests.ranges())
    assert len(ranges) > 4
    for index in (1, len(ranges) - 1):
        flip(data, ranges[index][0])
    found = damages(data.parent)
    assert [(each.file, each.chunk) for each in found] == [(data, 1), (data, len(ranges) - 1)]
    for each, index in zip(found, (1, len(ranges) - 1), strict=True):
        assert (each.begin, each.end, each.expected) == ranges[index]
        assert len(each.actual) == 32
        assert each.actual != each.expected


@each_kind
def test_truncation_names_the_first_lost_chunk_and_checks_the_rest(
    kind: str, tmp_path: Path
) -> None:
    data = KINDS[kind](tmp_path / "saved")
    digests = digests_of(data)
    assert digests is not None
    ranges = list(digests.ranges())
    data.write_bytes(data.read_bytes()[: ranges[-2][0] + 5])
    flip(data, ranges[1][0])
    found = damages(data)
    assert [each.chunk for each in found] == [1, len(ranges) - 2]
    (cut,) = [each for each in found if each.chunk == len(ranges) - 2]
    assert f"{ranges[-2][0] + 5:,} bytes long, and {digests.size:,} were saved" in cut.what


@each_kind
def test_a_byte_too_many_is_damage(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind](tmp_path / "saved")
    data.write_bytes(data.read_bytes() + b"x")
    (found,) = damages(data)
    assert "bytes long" in found.what


@each_kind
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_file_is_found(
    kind: str, where: float, bit: int, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    if not folder.exists():
        KINDS[kind](folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    position = int(where * sum(path.stat().st_size for path in files))
    for path in files:
        if position < path.stat().st_size:
            break
        position -= path.stat().st_size
    original = path.read_bytes()
    content = bytearray(original)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = damages(folder)
    finally:
        path.write_bytes(original)
    if path.name.endswith(SUFFIX):
        # What digests say of themselves may change in a way that means the same.
        named = {each.file for each in found}
        assert named <= {path, path.with_name(path.name.removesuffix(SUFFIX))}
        assert found or json.loads(content) == json.loads(original)
    else:
        assert {each.file for each in found} == {path}


def test_the_header_of_a_safetensors_file_is_covered(tmp_path: Path) -> None:
    data = save_safetensors(tmp_path / "saved")
    original = data.read_bytes()
    for position in (0, 7, 9, 200, 4000):
        flip(data, position)
        (found,) = damages(data)
        assert found.file == data
        assert found.chunk is None
        data.write_bytes(original)
    data.write_bytes(bytes(8) + original[8:])
    (found,) = damages(data)
    assert "never finished" in found.what


def test_a_data_file_that_is_gone_is_damage(tmp_path: Path) -> None:
    data = save_dcp(tmp_path / "saved")
    data.unlink()
    (found,) = damages(tmp_path / "saved")
    assert found.file == data.with_name(data.name + SUFFIX)
    assert "missing" in found.what


def test_files_of_others_are_reported_as_not_covered(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "plain.safetensors")
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "stock", no_dist=True)
    for path in (tmp_path / "plain.safetensors", tmp_path / "stock"):
        found = verify(path)
        assert {(each.status, each.what) for each in found} == {("warn", "not covered by digests")}


def test_all_checkpoints_of_a_run_are_verified(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", checkpoint={"keep": 0, "format": "safetensors"}) as run:
        for step in (1, 2, 3):
            run.save({"w": torch.ones(30)}, step).durable()
    folder = tmp_path / "run" / "checkpoints"
    assert not damages(folder)
    (folder / "step-00000001" / "manifest.json").unlink()
    data = folder / "step-00000002" / "model.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    (folder / "step-00000003" / "manifest.json").write_text('{"files": [1]}')
    (folder / "step-00000004.tmp-abc").mkdir()
    for path in (folder, tmp_path / "run"):
        found = damages(path)
        assert [each.file.relative_to(folder).as_posix() for each in found] == [
            "step-00000001",
            "step-00000002/model.safetensors",
            "step-00000002/model.safetensors",
            "step-00000003/manifest.json",
        ]
        assert "119 bytes" in found[1].what or "the manifest says" in found[1].what
        assert [each.file.name for each in verify(path) if "interrupted" in each.what] == [
            "step-00000004.tmp-abc"
        ]


def test_everything_that_a_run_saves_is_covered(tmp_path: Path) -> None:
    plugins = plugin_of(Plugin(), "fastpersist")
    with make_run(tmp_path / "run", plugins=plugins) as run:
        path = run.save({"model": torch.nn.Linear(30, 20), "epoch": 3}, 1).durable()
    found = verify(path)
    assert {each.status for each in found} == {"ok"}
    files = {each.file.name for each in found}
    assert {"manifest.json", ".metadata"} < files
    data = [name for name in files if name.endswith(".distcp")]
    flip(path / data[0], (path / data[0]).stat().st_size // 2)
    (damage,) = damages(tmp_path / "run")
    assert damage.file == path / data[0]


def test_a_hostile_manifest_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "data").write_bytes(b"x")
    for files in ({"../outside": 1}, {"/etc/hostname": 1}, [], {"data": "y"}, {"data": []}):
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        (found,) = damages(tmp_path)
        assert found.file == folder / "manifest.json"
        assert "damaged" in found.what
    (folder / "manifest.json").write_text("[" * 100_000)
    (found,) = damages(tmp_path)
    assert "damaged" in found.what


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to verify"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "absent")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    data = save_dcp(tmp_path / "saved")
    told: list[tuple[int, int]] = []
    verify(data, lambda size, total: told.append((size, total)))
    assert {total for _, total in told} == {data.stat().st_size}
    assert sum(size for size, _ in told) == data.stat().st_size
