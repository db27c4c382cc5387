"""``core convert`` and the formats below it: bit-equal, streaming, and safe on hostile files."""

from __future__ import annotations

import importlib
import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

import core
from core.checkpoints import convert
from core.checkpoints.safetensors import DTYPES
from core.cli import cli


@pytest.fixture
def run(tmp_path: Path) -> Iterator[core.Run]:
    with core.start(folder=tmp_path / "run") as run:
        yield run


def sample() -> dict[str, torch.Tensor]:
    """Every dtype of safetensors, in awkward shapes, and bits that arithmetic would lose."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPES.values():
        for shape in [(), (0,), (3, 0, 2), (5,), (4, 3)]:
            count = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            if dtype == torch.bool:
                raw = raw % 2
            name = f"{dtype}{list(shape)}".removeprefix("torch.")
            found[name] = (
                raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
            )
    found["transposed"] = torch.randn(6, 4).t()
    found["narrowed"] = torch.randn(6, 4)[1:4, 1:3]
    found["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    return found


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert bits(tensor) == bits(other), name
    return True


def converted(run: core.Run, source: Path, target: Path, to: str) -> Path:
    conversion = convert.plan(source, target, to, run)
    convert.execute(conversion)
    return target


def test_dcp_to_safetensors_and_back_is_bit_equal(run: core.Run, tmp_path: Path) -> None:
    tensors = sample()
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "stock")
    middle = converted(run, tmp_path / "stock", tmp_path / "st", "safetensors")
    assert same(load_file(middle / "model.safetensors"), tensors)
    back = converted(run, middle, tmp_path / "back", "dcp")
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    dcp.load(target, checkpoint_id=back)
    assert same(target, tensors)


def test_stock_safetensors_files_are_read(run: core.Run, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample().items()}
    names = sorted(tensors)
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({n: tensors[n] for n in names[:20]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[20:]}, folder / "b.safetensors")
    whole = converted(run, folder, tmp_path / "whole", "safetensors")
    assert same(load_file(whole / "model.safetensors"), tensors)


def test_a_checkpoint_of_a_run_stays_loadable(run: core.Run, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    path = run.save({"model": model, "epoch": 4}, 7).durable()
    moved = converted(run, path, tmp_path / "moved", "safetensors")
    other = torch.nn.Linear(3, 2)
    loaded = run.load({"model": other, "epoch": 0}, moved)
    assert (loaded.step, loaded.values["epoch"]) == (7, 4)
    assert torch.equal(other.weight, model.weight)


def test_the_command_line_converts_and_reports(tmp_path: Path) -> None:
    dcp.save({"x": torch.arange(6.0)}, checkpoint_id=tmp_path / "in")
    call = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "safetensors", "--json"]
    dry = CliRunner().invoke(cli, [*call, "--dry-run"])
    assert json.loads(dry.stdout)["done"] is False
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, call)
    assert json.loads(done.stdout[done.stdout.index("{") :])["bytes"] == 24
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].tolist() == list(range(6))


def test_objects_are_refused_or_left_out(run: core.Run, tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(2), "o": {"lr": 0.1}}, checkpoint_id=tmp_path / "in")
    with pytest.raises(core.CheckpointError, match=r"o\.lr"):
        convert.plan(tmp_path / "in", tmp_path / "out", "safetensors", run)
    plan = convert.plan(tmp_path / "in", tmp_path / "out", "safetensors", run, skip_objects=True)
    assert plan.work.skipped == ("o.lr",)
    convert.execute(plan)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["x"]


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, to: str) -> None:
    """Peak memory stays under 1.5 times the largest tensor plus a constant."""
    size, count = 64 * 2**20, 6
    source = tmp_path / "in"
    dcp.save({f"t{i}": torch.zeros(size // 4) for i in range(count)}, checkpoint_id=source)
    call = [sys.executable, __file__, str(source), str(tmp_path / "out"), to]
    grown = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    assert grown < 1.5 * size + 24 * 2**20


def test_a_failed_conversion_leaves_nothing(run: core.Run, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(4), "b": torch.ones(1000)}, checkpoint_id=tmp_path / "in")
    data = next((tmp_path / "in").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-3000])
    conversion = convert.plan(tmp_path / "in", tmp_path / "out", "safetensors", run)
    with pytest.raises(core.CheckpointError):
        convert.execute(conversion)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_what_cannot_be_converted_is_named(run: core.Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, reason in [("absent", "does not exist"), ("empty", "no known format")]:
        with pytest.raises(core.CheckpointError, match=reason):
            convert.plan(tmp_path / source, tmp_path / "out", "dcp", run)
    dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / "in")
    with pytest.raises(core.PluginError, match="did you mean 'safetensors'"):
        convert.plan(tmp_path / "in", tmp_path / "out", "safetensor", run)
    with pytest.raises(core.CheckpointError, match="exists already"):
        convert.plan(tmp_path / "in", tmp_path / "empty", "dcp", run)


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path("pwned").write_text, ("x",))


def test_hostile_metadata_runs_nothing(
    run: core.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    for content in (pickle.dumps(Hostile()), b"garbage", pickle.dumps([1]), b""):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(core.CheckpointError):
            convert.plan(folder, tmp_path / "out", "safetensors", run)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "Metadata", "__init__"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex", "__hash__"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "new"),
        ("pathlib", "PosixPath", "is_file"),
    ],
)
def test_metadata_cannot_change_classes(
    module: str, kind: str, name: str, run: core.Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    found = getattr(importlib.import_module(module), kind)
    before = getattr(found, name, None)
    text = name.encode()
    build = f"c{module}\n{kind}\n".encode() + b"(N}X" + len(text).to_bytes(4, "little") + text
    content = b"\x80\x02" + build + b"ctorch\nSize\nstb." if name == "new" else b""
    content = content or b"\x80\x02" + build + b"Nstb."
    (tmp_path / "in" / ".metadata").write_bytes(content)
    with pytest.raises(core.CheckpointError, match="wants to change"):
        convert.plan(tmp_path / "in", tmp_path / "out", "safetensors", run)
    assert getattr(found, name, None) is before


@pytest.mark.parametrize(
    "change",
    [
        {"relative_path": "../outside"},
        {"relative_path": "/etc/hostname"},
        {"length": 10**15},
        {"offset": -5},
        {"transform_descriptors": ["stream.zstd"]},
    ],
)
def test_forged_entries_are_refused(run: core.Run, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "in"
    dcp.save({"x": torch.ones(4)}, checkpoint_id=folder)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.storage_data = {k: replace(v, **change) for k, v in metadata.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    conversion = convert.plan(folder, tmp_path / "out", "safetensors", run)
    with pytest.raises(core.CheckpointError):
        convert.execute(conversion)
    assert not (tmp_path / "out").exists()


def header(content: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if claimed is None else claimed) + content


HOLE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
OVERLAP = (
    b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
    b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}'
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(b"{}", 2**63),
        header(b"{}", 10**9),
        header(b"[" * 100_000),
        header(b"{}") + b"tail",
        header(HOLE) + b"xx",
        header(OVERLAP) + b"xxx",
        header(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}'),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,2]}}') + b"xx",
        header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,2]}}') + b"xx",
    ],
)
def test_hostile_headers_are_one_clear_error(run: core.Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(core.CheckpointError, match="bad.safetensors"):
        convert.plan(path, tmp_path / "out", "dcp", run)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_any_damaged_file_is_read_or_refused(
    run: core.Run, tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    """Whatever bytes are flipped, there is a result or a ``CheckpointError``, and nothing else."""
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    dcp.save({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, checkpoint_id=tmp_path / "in")
    data = next((tmp_path / "in").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    for position, change in flips:
        content[position % len(content)] ^= change
    data.write_bytes(content)
    target = {"a": torch.empty(4), "b": torch.empty(2, 2)}
    conversion = convert.plan(tmp_path / "in", tmp_path / "out", "safetensors", run)
    try:
        convert.execute(conversion)
    except core.CheckpointError:
        assert not (tmp_path / "out").exists()
    else:
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == target.keys()
        shutil.rmtree(tmp_path / "out")


def _measure(source: Path, target: Path, to: str) -> int:
    """Bytes by which a conversion raises the peak memory of a process."""
    with core.start(folder=target.parent / "run") as run:
        conversion = convert.plan(source, target, to, run)
        small = {"w": torch.zeros(1)}
        dcp.save(small, checkpoint_id=target.parent / "warm")
        converted(run, target.parent / "warm", target.parent / "warm-out", to)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert.execute(conversion)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    print(_measure(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
