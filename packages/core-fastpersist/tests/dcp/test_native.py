"""The native writer: stock DCP reads what it writes, bit for bit, and two saves never mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from core.errors import CheckpointError
from core_fastpersist import NativeReader, NativeWriter, Staging, WriteOptions

KINDS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def many_kinds() -> dict[str, torch.Tensor]:
    base = torch.arange(40_000.0).reshape(200, 200) - 300
    found = {str(kind).removeprefix("torch."): base.abs().to(kind) for kind in KINDS}
    payloads = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800001], dtype=torch.int32)
    tied = torch.randn(300, 7)
    return {
        **found,
        "nan payloads": payloads.view(torch.float32),
        "minus zero": torch.tensor([-0.0, 5e-324], dtype=torch.float64),
        "0-dim": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "sliced": base[:, 3:90],
        "expanded": torch.ones(1, 5).expand(4, 5),
        "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
        "large": torch.randn(3_000_001),
        "tied.a": tied,
        "tied.b": tied,
    }


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert bits(tensor) == bits(right[name]), name


def room(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items()}


@pytest.mark.parametrize(
    "options", [WriteOptions(), WriteOptions(chunk=2**16, threads=4, ring=2**13)]
)
def test_stock_dcp_reads_every_kind_of_tensor(options: WriteOptions, tmp_path: Path) -> None:
    state = many_kinds()
    dcp.save(state, storage_writer=NativeWriter(tmp_path, Staging(options=options)))
    found = room(state)
    dcp.load(found, checkpoint_id=tmp_path)
    same(state, found)
    again = room(state)
    dcp.load(again, storage_reader=NativeReader(tmp_path))
    same(state, again)


def test_stock_conversion_to_one_file_reads_it(tmp_path: Path) -> None:
    state = {"w": torch.randn(100, 100), "note": "text", "steps": 3}
    dcp.save(state, storage_writer=NativeWriter(tmp_path / "dcp"))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "one.pt")
    found: dict[str, Any] = torch.load(tmp_path / "one.pt", weights_only=True)
    assert torch.equal(found["w"], state["w"])
    assert (found["note"], found["steps"]) == ("text", 3)


@pytest.mark.parametrize("mode", ["copy", "live"])
@pytest.mark.parametrize("writer", ["thread", "process"])
def test_async_save_in_every_mode(mode: Any, writer: Any, tmp_path: Path) -> None:
    staging = Staging(mode=mode, writer=writer, audits=0)
    state: dict[str, Any] = {**many_kinds(), "nested": {"list": [torch.ones(3), 1]}}
    for number in range(2):
        folder = tmp_path / str(number)
        dcp.async_save(state, storage_writer=NativeWriter(folder, staging), no_dist=True).result()
        found: dict[str, Any] = room(many_kinds())
        found["nested"] = {"list": [torch.zeros(3), 0]}
        dcp.load(found, checkpoint_id=folder)
        assert torch.equal(found.pop("nested")["list"][0], torch.ones(3))
        same({k: v for k, v in state.items() if k != "nested"}, found)
    staging.close()


def test_copies_keep_the_moment_of_the_call(tmp_path: Path) -> None:
    staging = Staging(mode="copy", options=WriteOptions(chunk=2**20))
    tensor = torch.zeros(4_000_000)
    future = dcp.async_save(
        {"w": tensor, "n": [1]}, storage_writer=NativeWriter(tmp_path, staging), no_dist=True
    )
    tensor.fill_(1)
    future.result()
    found = {"w": torch.ones(4_000_000)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert not found["w"].any()
    staging.close()


def test_large_tensors_go_to_the_disk_from_where_they_lie(tmp_path: Path) -> None:
    from core_fastpersist.direct.alignment import alignment_of
    from core_fastpersist.direct.newfile import NewFile

    if not alignment_of(tmp_path).direct:
        pytest.skip(f"no direct I/O here: {alignment_of(tmp_path).reason}")
    seen = []
    close = NewFile.close

    def spy(file: NewFile) -> None:
        seen.append((file.written.straight, file.written.copied))
        close(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NewFile, "close", spy)
        dcp.save(
            {str(i): torch.randn(2**20) for i in range(8)}, storage_writer=NativeWriter(tmp_path)
        )
    straight, copied = seen[0]
    assert straight > 0.99 * 8 * 2**22
    assert copied < 8 * 5 * 4096


def test_a_second_save_into_one_folder_replaces_the_first(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(500_000)}, storage_writer=NativeWriter(tmp_path))
    dcp.save({"w": torch.full((1000,), 2.0)}, storage_writer=NativeWriter(tmp_path))
    found = {"w": torch.zeros(1000)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert (found["w"] == 2).all()
    assert len(list(tmp_path.glob("*.distcp"))) == 1


def test_a_failed_save_leaves_the_first_untouched(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(1000)}, storage_writer=NativeWriter(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = {"w": torch.ones(1000), "s": torch.eye(3).to_sparse()}
    with pytest.raises(CheckpointException, match=r"sparse_coo(.|\n)*dense tensors"):
        dcp.save(bad, storage_writer=NativeWriter(tmp_path))
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content
    found = {"w": torch.zeros(1000)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert found["w"].all()


def test_a_flipped_bit_is_an_error_that_names_file_and_place(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(1_000_000)}, storage_writer=NativeWriter(tmp_path))
    (path,) = tmp_path.glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[2_000_000] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointException, match=f"{path.name} is damaged in bytes"):
        dcp.load({"w": torch.zeros(1_000_000)}, storage_reader=NativeReader(tmp_path))


def test_a_damaged_metadata_file_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(10)}, storage_writer=NativeWriter(tmp_path))
    path = tmp_path / ".metadata"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged in bytes"):
        NativeReader(tmp_path).read_metadata()


def test_metadata_of_its_own_for_each_rank(tmp_path: Path) -> None:
    """``use_collectives=False`` writes one metadata file a rank, as stock DCP does."""
    dcp.save({"w": torch.ones(9)}, storage_writer=NativeWriter(tmp_path), use_collectives=False)
    assert any(path.name.endswith(".metadata") for path in tmp_path.iterdir())
    found = {"w": torch.zeros(9)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert found["w"].all()
