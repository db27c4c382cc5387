"""Safetensors files and folders: real ones, those of DCP's writer, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import CheckpointError
from core_ucp.sources.huggingface import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]
SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of transformers with several files, and its weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="3KB")
    return folder, {f"model.{key}": tensor for key, tensor in model.state_dict().items()}


@pytest.fixture
def copied(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """The same folder, for tests that damage it."""
    return Path(shutil.copytree(llama[0], tmp_path / "copied"))


def test_a_folder_of_transformers(
    llama: tuple[Path, dict[str, torch.Tensor]], same_bits: SameBits
) -> None:
    folder, truth = llama
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert detect(folder)
    same_bits(open_view(folder), truth)


def test_one_file(tmp_path: Path, same_bits: SameBits) -> None:
    state = {"model.a": torch.randn(2, 3), "b": torch.ones(()), "none": torch.ones(0, 2)}
    save_file(state, tmp_path / "weights.safetensors")
    truth = {f"model.{key}": tensor for key, tensor in state.items()}
    assert detect(tmp_path / "weights.safetensors")
    same_bits(open_view(tmp_path / "weights.safetensors"), truth)
    same_bits(open_view(tmp_path), truth)


def test_parts_of_ranks_come_together(made: Path, same_bits: SameBits) -> None:
    view = open_view(made / "safetensors_shards" / "checkpoint")
    same_bits(view, torch.load(made / "safetensors_shards" / "truth.pt"))
    assert any("missing last one hides" in remark for remark in view.remarks)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_missing_part_is_named(rank: int, made: Path, tmp_path: Path) -> None:
    source = made / "safetensors_shards" / "checkpoint"
    folder = Path(shutil.copytree(source, tmp_path / "copied"))
    gone = f"shard-{rank:05}-model-00001-of-00001.safetensors"
    (folder / gone).unlink()
    with pytest.raises(CheckpointError, match=f"{gone} is missing"):
        open_view(folder)


def test_a_missing_file_of_the_index_is_named(copied: Path) -> None:
    first = min(copied.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing"):
        open_view(copied)


def test_a_missing_file_is_named_without_an_index(copied: Path) -> None:
    (copied / "model.safetensors.index.json").unlink()
    last = max(copied.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(CheckpointError, match=f"{last.name} is missing"):
        open_view(copied)


def test_a_tensor_that_the_index_misplaces(copied: Path) -> None:
    path = copied / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted({*index["weight_map"].values()})
    key = next(k for k, name in index["weight_map"].items() if name == names[0])
    index["weight_map"][key] = names[1]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"does not hold {key}"):
        open_view(copied)


def test_a_stale_file_is_left_out_with_a_remark(
    copied: Path, llama: tuple[Path, dict[str, torch.Tensor]], same_bits: SameBits
) -> None:
    save_file({"old": torch.ones(2)}, copied / "old.safetensors")
    view = open_view(copied)
    same_bits(view, llama[1])
    assert any(remark.startswith("old.safetensors") for remark in view.remarks)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_damaged_index_is_refused(text: bytes, copied: Path) -> None:
    (copied / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        open_view(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    path = sorted(copied.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=path.name):
        open_view(copied)


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="'w' in a.safetensors and b.safetensors"):
        open_view(tmp_path)


def test_damaged_offsets_of_parts_are_refused(tmp_path: Path) -> None:
    info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": ["x"]}})}
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata=info)
    with pytest.raises(CheckpointError, match="damaged header"):
        open_view(tmp_path)


def test_what_the_writer_of_dcp_makes_of_a_number_is_refused(tmp_path: Path) -> None:
    """It writes a number among tensors as a pickle, and a header that does not add up."""
    writer = HuggingFaceStorageWriter(str(tmp_path / "out"))
    dcp.save({"w": torch.ones(2), "n": 3}, storage_writer=writer)
    with pytest.raises(CheckpointError):
        open_view(tmp_path / "out")
