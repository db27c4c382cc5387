"""Folders that accelerate has really saved, and those of the trainer of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import CheckpointError
from core_ucp.sources import full, huggingface
from core_ucp.sources.accelerate import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


@pytest.mark.parametrize("case", ["accelerated", "accelerated_fsdp2"])
def test_every_bit_is_found(case: str, made: Path, same_bits: SameBits) -> None:
    folder = made / case / "checkpoint"
    assert detect(folder)
    assert not huggingface.detect(folder)
    assert not full.detect(folder)
    view = open_view(folder)
    same_bits(view, torch.load(made / case / "truth.pt"))
    assert view.resume.step == 3
    assert view.resume.hyper["first.norm.weight"]["weight_decay"] == 0.0
    assert view.resume.hyper["second.down.weight"]["weight_decay"] == 0.1


def test_the_scheduler_is_found(made: Path) -> None:
    resume = open_view(made / "accelerated" / "checkpoint").resume
    assert resume.scheduler["last_epoch"] == 1


def test_safetensors_do_not_tell_the_order_so_states_keep_their_numbers(
    made: Path, same_bits: SameBits
) -> None:
    view = open_view(made / "accelerated" / "safetensors")
    truth = torch.load(made / "accelerated" / "truth.pt")
    for key in [key for key in view.atoms if key.startswith("extra.optimizer.state.")]:
        del view.atoms[key]
    same_bits(view, {key: t for key, t in truth.items() if key.startswith("model.")})
    assert any("names cannot be told" in remark for remark in view.remarks)


def test_states_of_processes_are_skipped_with_a_remark(made: Path) -> None:
    remarks = open_view(made / "accelerated" / "checkpoint").remarks
    assert any(remark.startswith("random_states_0.pkl") for remark in remarks)


def test_a_checkpoint_of_the_trainer(tmp_path: Path, same_bits: SameBits) -> None:
    """With names in the optimizer's groups, safetensors are as good as any."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"last_epoch": 7}, tmp_path / "scheduler.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 12, "epoch": 0.5}))
    view = open_view(tmp_path)
    truth = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for number, states in optimizer.state_dict()["state"].items():
        truth |= {f"optim.state.{names[number]}.{key}": t for key, t in states.items()}
    same_bits(view, truth)
    assert view.resume.step == 12
    assert view.resume.scheduler == {"last_epoch": 7}
    assert view.resume.hyper["bias"]["lr"] == 0.5


def test_a_full_state_of_fsdp(tmp_path: Path, same_bits: SameBits) -> None:
    """Under FULL_STATE_DICT accelerate leaves two files, with names in both."""
    weight, moment = torch.randn(3, 2), torch.randn(3, 2)
    torch.save({"layer.weight": weight}, tmp_path / "pytorch_model_fsdp.bin")
    states = {"layer.weight": {"exp_avg": moment, "step": torch.tensor(4.0)}}
    groups = [{"params": ["layer.weight"], "lr": 0.5}]
    torch.save({"state": states, "param_groups": groups}, tmp_path / "optimizer.bin")
    view = open_view(tmp_path)
    truth = {f"optim.state.layer.weight.{k}": t for k, t in states["layer.weight"].items()}
    same_bits(view, {"model.layer.weight": weight, **truth})
    assert view.resume.step == 4
    assert view.resume.hyper == {"layer.weight": {"lr": 0.5}}


def test_two_models_are_refused(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "accelerated" / "safetensors", tmp_path / "copied")
    shutil.copy(folder / "model.safetensors", folder / "model_1.safetensors")
    with pytest.raises(CheckpointError, match="several models"):
        open_view(folder)


def test_a_truncated_optimizer_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "accelerated" / "checkpoint", tmp_path / "copied"))
    path = folder / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="optimizer.bin"):
        open_view(folder)


def test_a_missing_file_under_fsdp_is_named(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "accelerated_fsdp2" / "checkpoint", tmp_path / "copied"))
    (folder / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer_0/__1_0.distcp"):
        open_view(folder)
