"""Real DCP folders open with the right names and bits; holes and hostile files are refused."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from core.errors import CheckpointError
from core_ucp.sources.dcp import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A checkpoint of three FSDP2 ranks that a test may damage."""
    return Path(shutil.copytree(made / "fsdp2" / "checkpoint", tmp_path / "copied"))


def metadata(folder: Path) -> Metadata:
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def put(folder: Path, content: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "case", ["plain", "flattened", "numbered", "fsdp2", "hsdp", "tensor_parallel"]
)
def test_every_bit_of_a_real_checkpoint_is_found(
    case: str, made: Path, same_bits: SameBits
) -> None:
    assert detect(made / case / "checkpoint")
    view = open_view(made / case / "checkpoint")
    same_bits(view, torch.load(made / case / "truth.pt"))
    assert view.resume.step == 3


@pytest.mark.parametrize("case", ["plain", "flattened", "numbered", "fsdp2"])
def test_hyper_parameters_are_found_by_name(case: str, made: Path) -> None:
    hyper = open_view(made / case / "checkpoint").resume.hyper
    assert len(hyper) == 10
    assert hyper["first.up.weight"]["weight_decay"] == 0.1
    assert hyper["second.norm.bias"]["weight_decay"] == 0.0
    assert hyper["first.up.bias"]["betas"] == (0.9, 0.999)


def test_what_is_no_tensor_is_kept(made: Path) -> None:
    resume = open_view(made / "plain" / "checkpoint").resume
    assert resume.client == {"epoch": 4}
    assert resume.scheduler == {"last_epoch": 3, "_last_lr": [0.01, 0.02]}


def test_relations_of_states_to_weights(made: Path) -> None:
    atoms = open_view(made / "fsdp2" / "checkpoint").atoms
    assert atoms["optim.state.first.up.weight.exp_avg"].relation == "elementwise"
    assert atoms["optim.state.first.up.weight.step"].relation == "scalar"


def test_a_bare_state_dict_keeps_its_names(tmp_path: Path, same_bits: SameBits) -> None:
    state = {"model.embed.weight": torch.randn(3, 2), "head.weight": torch.randn(2)}
    dcp.save(dict(state), checkpoint_id=tmp_path / "out")
    same_bits(open_view(tmp_path / "out"), {f"model.{key}": t for key, t in state.items()})


def test_wrappers_leave_no_trace_in_names(tmp_path: Path, same_bits: SameBits) -> None:
    weight, moment = torch.randn(3), torch.randn(3)
    name = "_orig_mod.block._checkpoint_wrapped_module.weight"
    state = {"model": {name: weight}, "optim": {"state": {"block.weight": {"exp_avg": moment}}}}
    dcp.save(state, checkpoint_id=tmp_path / "out")
    truth = {"model.block.weight": weight, "optim.state.block.weight.exp_avg": moment}
    same_bits(open_view(tmp_path / "out"), truth)


def test_names_that_only_wrappers_tell_apart_are_kept(tmp_path: Path) -> None:
    state = {"model": {"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.zeros(1)}}
    dcp.save(state, checkpoint_id=tmp_path / "out")
    view = open_view(tmp_path / "out")
    assert view.atoms.keys() == {"model.a.weight", "model._orig_mod.a.weight"}
    assert "wrappers" in view.remarks[0]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int8, torch.complex64]
)
def test_dtypes_and_odd_shapes(dtype: torch.dtype, tmp_path: Path, same_bits: SameBits) -> None:
    state = {
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.ones(0, 3).to(dtype),
        "name/with space ü": torch.arange(6).reshape(2, 3).to(dtype),
        "permuted": torch.arange(24).reshape(2, 3, 4).to(dtype).permute(2, 0, 1),
    }
    dcp.save({"model": state}, checkpoint_id=tmp_path / "out")
    same_bits(open_view(tmp_path / "out"), {f"model.{key}": t for key, t in state.items()})


def test_values_that_are_objects_are_left_out_with_a_remark(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "odd": Path("x")}, checkpoint_id=tmp_path / "out")
    view = open_view(tmp_path / "out")
    assert view.resume.client == {}
    assert [remark for remark in view.remarks if "odd" in remark and "athlib" in remark]


def test_tensors_inside_of_pickled_values_are_kept(tmp_path: Path, same_bits: SameBits) -> None:
    class Held(dict[str, Any]):
        """DCP pickles what is neither a dict nor a list as one object."""

    inner = torch.randn(4)
    buffer = io.BytesIO()
    torch.save({"inner": inner, "n": 3}, buffer)
    dcp.save({"model": {"w": torch.ones(2)}, "held": 0}, checkpoint_id=tmp_path / "out")
    folder = tmp_path / "out"
    content = metadata(folder)
    index, info = next((k, v) for k, v in content.storage_data.items() if k.fqn == "held")
    (folder / "more.distcp").write_bytes(buffer.getvalue())
    content.storage_data[index] = type(info)("more.distcp", 0, len(buffer.getvalue()))
    put(folder, content)
    view = open_view(folder)
    same_bits(view, {"model.w": torch.ones(2), "extra.held.inner": inner})
    assert view.resume.client == {"held": {"n": 3}}


def test_a_chunk_that_no_file_has_is_named(copied: Path) -> None:
    content = metadata(copied)
    gone = next(k for k in content.storage_data if k.fqn == "model.first.up.weight" and k.offset[0])
    del content.storage_data[gone]
    put(copied, content)
    with pytest.raises(CheckpointError, match=r"\[4:8, 0:7\] of model.first.up.weight"):
        open_view(copied)


def test_a_hole_between_chunks_is_named(copied: Path) -> None:
    content = metadata(copied)
    entry = content.state_dict_metadata["optim.state.first.up.weight.exp_avg"]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets[0] != 4]
    put(copied, content)
    with pytest.raises(CheckpointError, match="optim.state.first.up.weight.exp_avg") as caught:
        open_view(copied)
    assert "28 of 70 elements are missing, the first in rows 4 to 7" in caught.value.why


def test_files_of_more_ranks_are_remarked(copied: Path) -> None:
    shutil.copy(copied / "__0_0.distcp", copied / "__7_0.distcp")
    assert any(remark.startswith("__7_0.distcp") for remark in open_view(copied).remarks)


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__1_0.distcp"):
        open_view(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    path = copied / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="__1_0.distcp is truncated"):
        open_view(copied)


def test_a_blob_of_another_tensor_is_refused(copied: Path) -> None:
    content = metadata(copied)
    weight, bias = (
        next(k for k in content.storage_data if k.fqn == f"model.first.up.{name}")
        for name in ("weight", "bias")
    )
    content.storage_data[bias] = content.storage_data[weight]
    put(copied, content)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_view(copied)


def test_damaged_heads_of_blobs_are_never_read_wrongly(copied: Path) -> None:
    """A flipped byte before the elements is an error, unless it changes nothing at all."""
    path = copied / "__0_0.distcp"
    content = path.read_bytes()
    key = "model.second.up.bias"
    info = next(v for k, v in metadata(copied).storage_data.items() if k.fqn == key)
    assert info.relative_path == path.name
    before = open_view(copied).atoms[key].pieces
    refused = 0
    for position in range(0, int(before.offset[0]) - info.offset, 7):
        damaged = bytearray(content)
        damaged[info.offset + position] ^= 0x41
        path.write_bytes(damaged)
        try:
            after = open_view(copied).atoms[key].pieces
        except CheckpointError:
            refused += 1
        else:
            assert after.offset.tolist() == before.offset.tolist()
            assert after.stride.tolist() == before.stride.tolist()
    assert refused > 20


class Hostile:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code ran')",))


def test_hostile_metadata_runs_nothing(copied: Path) -> None:
    put(copied, Hostile())
    with pytest.raises(CheckpointError, match="exec"):
        open_view(copied)


def test_a_hostile_value_runs_nothing(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "odd": Hostile()}, checkpoint_id=tmp_path / "out")
    view = open_view(tmp_path / "out")
    assert any("exec" in remark for remark in view.remarks)


@pytest.mark.parametrize("change", ["leaves the folder", "negative", "no mapping", "no shape"])
def test_metadata_that_lies_is_refused(change: str, copied: Path) -> None:
    content = metadata(copied)
    index = next(iter(content.storage_data))
    info = content.storage_data[index]
    if change == "leaves the folder":
        content.storage_data[index] = type(info)("../outside", info.offset, info.length)
    elif change == "negative":
        content.storage_data[index] = type(info)(info.relative_path, -8, info.length)
    elif change == "no mapping":
        content.storage_data = 5
    else:
        content.state_dict_metadata["model.first.up.weight"].size = "large"
    put(copied, content)
    with pytest.raises(CheckpointError):
        open_view(copied)
