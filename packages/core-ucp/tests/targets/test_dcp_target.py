"""DCP folders that we make: stock ``dcp.load`` reads every bit of them into any model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from core.errors import CheckpointError
from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources import full, huggingface
from core_ucp.sources.dcp import open_view
from core_ucp.targets.dcp import DcpOptions, build
from core_ucp.view.view import View


def made(view: View, folder: Path, options: DcpOptions | None = None) -> Path:
    """Carry a conversion out."""
    folder.mkdir()
    execute(plan(view, build(view, options)), folder)
    return folder


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def source(tmp_path: Path) -> tuple[nn.Module, torch.optim.Optimizer, View]:
    model, optimizer = trained()
    states: Any = get_state_dict(model, optimizer)
    state = {"model": states[0], "optimizer": states[1], "lr_scheduler": {"last_epoch": 2}}
    torch.save({**state, "note": "x"}, tmp_path / "run.pt")
    return model, optimizer, full.open_view(tmp_path / "run.pt")


def flat(tree: Any, place: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], f"{place}.{key}").items()}
    if isinstance(tree, list):
        return flat(dict(enumerate(tree)), place)
    return {place: tree}


def same(left: Any, right: Any) -> bool:
    a, b = flat(left), flat(right)
    assert a.keys() == b.keys()
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


@pytest.mark.parametrize("flatten", [False, True])
def test_torch_loads_it_into_a_model_and_optimizer(
    flatten: bool, source: tuple[nn.Module, torch.optim.Optimizer, View], tmp_path: Path
) -> None:
    model, optimizer, view = source
    folder = made(view, tmp_path / "out")
    fresh, other = trained()
    for tensor in [*fresh.state_dict().values(), *flat(other.state_dict()["state"]).values()]:
        tensor.zero_()
    for group in other.param_groups:
        group["lr"] = 9.0
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    names, states = get_state_dict(fresh, other, options=options)
    template: dict[str, Any] = {"model": names, "optim": states}
    dcp.load(template, checkpoint_id=folder)
    set_state_dict(
        fresh,
        other,
        model_state_dict=template["model"],
        optim_state_dict=template["optim"],
        options=options,
    )
    assert same(fresh.state_dict(), model.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())


def test_values_beside_tensors_are_loaded(
    source: tuple[nn.Module, torch.optim.Optimizer, View], tmp_path: Path
) -> None:
    folder = made(source[2], tmp_path / "out")
    state: dict[str, Any] = {"step": 0, "lr_scheduler": {"last_epoch": 0}, "note": ""}
    dcp.load(state, checkpoint_id=folder)
    assert state == {"step": 2, "lr_scheduler": {"last_epoch": 2}, "note": "x"}


def test_our_reader_finds_what_went_in(
    source: tuple[nn.Module, torch.optim.Optimizer, View], tmp_path: Path
) -> None:
    view = source[2]
    again = open_view(made(view, tmp_path / "out", DcpOptions(limit=4000)))
    assert len(again.files) > 3
    assert again.atoms.keys() == view.atoms.keys()
    assert again.resume.hyper == view.resume.hyper
    assert again.resume.step == view.resume.step
    assert again.resume.scheduler == view.resume.scheduler
    assert again.resume.client["note"] == "x"


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float8_e5m2, torch.bool, torch.uint16, torch.int64, torch.complex64],
)
def test_all_dtypes_and_odd_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.ones(0, 3).to(dtype),
        "odd/name ü": torch.arange(35).reshape(5, 7).to(dtype),
    }
    torch.save(state, tmp_path / "run.pt")
    folder = made(full.open_view(tmp_path / "run.pt"), tmp_path / "out")
    loaded = {"model": {key: torch.zeros_like(tensor) for key, tensor in state.items()}}
    dcp.load(loaded, checkpoint_id=folder)
    for key, tensor in state.items():
        found = loaded["model"][key].reshape(-1).view(torch.uint8)
        assert torch.equal(found, tensor.reshape(-1).view(torch.uint8))


def test_tied_weights_are_there_under_both_names(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    torch.save({"a": weight, "b": weight}, tmp_path / "run.pt")
    folder = made(full.open_view(tmp_path / "run.pt"), tmp_path / "out")
    loaded = {"model": {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}}
    dcp.load(loaded, checkpoint_id=folder)
    assert torch.equal(loaded["model"]["a"], weight)
    assert torch.equal(loaded["model"]["b"], weight)


def test_strided_pieces_become_row_major(tmp_path: Path) -> None:
    turned = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    torch.save({"w": turned}, tmp_path / "run.pt")
    folder = made(full.open_view(tmp_path / "run.pt"), tmp_path / "out")
    loaded = {"model": {"w": torch.zeros(4, 2, 3)}}
    dcp.load(loaded, checkpoint_id=folder)
    assert torch.equal(loaded["model"]["w"], turned)


def test_safetensors_become_dcp(tmp_path: Path) -> None:
    state = {"layer.weight": torch.randn(4, 5), "layer.bias": torch.randn(4)}
    save_file(state, tmp_path / "model.safetensors")
    view = huggingface.open_view(tmp_path / "model.safetensors")
    loaded = {"model": {key: torch.zeros_like(tensor) for key, tensor in state.items()}}
    dcp.load(loaded, checkpoint_id=made(view, tmp_path / "out"))
    assert same(loaded["model"], state)


def test_two_entries_of_one_name_are_refused(
    source: tuple[nn.Module, torch.optim.Optimizer, View],
) -> None:
    view = copy.copy(source[2])
    clash = {**view.atoms, "extra.model.0.weight": view.atoms["model.0.weight"]}
    object.__setattr__(view, "atoms", clash)
    with pytest.raises(CheckpointError, match=r"two entries would be called model.0.weight"):
        build(view)


def test_a_value_that_cannot_be_kept_is_remarked(
    source: tuple[nn.Module, torch.optim.Optimizer, View], tmp_path: Path
) -> None:
    view = copy.copy(source[2])
    resume = copy.copy(view.resume)
    object.__setattr__(resume, "client", {"odd": object()})
    object.__setattr__(view, "resume", resume)
    assert any("odd" in remark for remark in build(view).remarks)
