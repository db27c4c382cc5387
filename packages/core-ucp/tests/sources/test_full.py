"""One ``torch.save`` of a state: weights, optimizers by name and by number, tied weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import CheckpointError
from core_ucp.sources.full import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


def trained(groups: Callable[[nn.Module], Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(groups(model), lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def truth(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {})
        found |= {f"optim.state.{name}.{key}": tensor for key, tensor in states.items()}
    return found


def by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("names", [("model", "optimizer"), ("state_dict", "optimizer_states")])
def test_a_whole_run(names: tuple[str, str], tmp_path: Path, same_bits: SameBits) -> None:
    model, optimizer = trained(lambda model: model.parameters())
    states: Any = optimizer.state_dict()
    state = {
        names[0]: model.state_dict(),
        names[1]: states if names[1] == "optimizer" else [states],
        "epoch": 3,
        "args": argparse.Namespace(rate=1),
    }
    torch.save(state, tmp_path / "run.pt")
    assert detect(tmp_path / "run.pt")
    view = open_view(tmp_path / "run.pt")
    same_bits(view, truth(model, optimizer))
    assert (view.resume.step, view.resume.client) == (2, {"epoch": 3})
    assert view.resume.hyper["1.bias"]["lr"] == 0.1
    assert any("argparse.Namespace" in remark for remark in view.remarks)


def test_groups_with_and_without_decay(tmp_path: Path, same_bits: SameBits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(by_dimensions(model))
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    view = open_view(tmp_path / "run.pt")
    same_bits(view, truth(model, optimizer))
    assert view.resume.hyper["1.bias"]["weight_decay"] == 0.0


def test_numbers_that_could_mean_several_parameters_are_refused(tmp_path: Path) -> None:
    def shuffled(model: nn.Module) -> list[dict[str, Any]]:
        first, *others = model.parameters()
        return [{"params": [others[1]]}, {"params": [first, others[0], *others[2:]]}]

    model, optimizer = trained(shuffled)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="names cannot be told"):
        open_view(tmp_path / "run.pt")


def test_an_optimizer_without_states(tmp_path: Path, same_bits: SameBits) -> None:
    """SGD without momentum keeps nothing but its settings."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    view = open_view(tmp_path / "run.pt")
    same_bits(view, {f"model.{key}": tensor for key, tensor in model.state_dict().items()})
    assert {name: hyper["lr"] for name, hyper in view.resume.hyper.items()} == {
        "weight": 0.3,
        "bias": 0.3,
    }


def test_settings_that_nobody_can_name_are_remarked(tmp_path: Path) -> None:
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    optimizer = torch.optim.SGD([{"params": [model["b"]]}, {"params": [model["a"]]}], lr=0.3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    view = open_view(tmp_path / "run.pt")
    assert view.resume.hyper == {}
    assert any("hyper-parameters are left out" in remark for remark in view.remarks)


def test_names_in_the_groups(tmp_path: Path, same_bits: SameBits) -> None:
    model, optimizer = trained(lambda model: list(model.named_parameters())[::-1])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    same_bits(open_view(tmp_path / "run.pt"), truth(model, optimizer))


def test_a_bare_state_dict(tmp_path: Path, same_bits: SameBits) -> None:
    state = {"model.a": torch.randn(2, 3), "head": torch.randn(4).to(torch.bfloat16)}
    torch.save(state, tmp_path / "weights.bin")
    same_bits(open_view(tmp_path / "weights.bin"), {f"model.{k}": t for k, t in state.items()})


def test_tied_weights_are_aliases(tmp_path: Path, same_bits: SameBits) -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    moment = torch.randn(3, 2)
    state = {
        "model": {"head.weight": weight, "embed.weight": weight},
        "optimizer": {"state": {"embed.weight": {"exp_avg": moment}}, "param_groups": []},
    }
    torch.save(state, tmp_path / "run.pt")
    view = open_view(tmp_path / "run.pt")
    same_bits(view, {"model.embed.weight": weight, "optim.state.embed.weight.exp_avg": moment})
    assert view.aliases == {"head.weight": "embed.weight"}


def test_tied_weights_are_one_parameter_to_an_optimizer(
    tmp_path: Path, same_bits: SameBits
) -> None:
    weight, other = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight, other])
    (weight.sum() + other.sum()).backward()
    optimizer.step()
    model = {"embed": weight, "inner": other, "head": weight}
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    found = {"model.embed": weight, "model.inner": other}
    for name, parameter in (("embed", weight), ("inner", other)):
        found |= {f"optim.state.{name}.{k}": t for k, t in optimizer.state[parameter].items()}
    view = open_view(tmp_path / "run.pt")
    same_bits(view, found)
    assert view.aliases == {"head": "embed"}


def test_strided_and_shared_tensors(tmp_path: Path, same_bits: SameBits) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {"columns": base[:, 2:5], "turned": base.t(), "row": base[1]}
    torch.save(state, tmp_path / "weights.pt")
    same_bits(open_view(tmp_path / "weights.pt"), {f"model.{k}": t for k, t in state.items()})


def test_the_old_files_of_hugging_face(tmp_path: Path, same_bits: SameBits) -> None:
    parts = {"first.bin": {"a": torch.randn(2)}, "second.bin": {"b": torch.randn(3)}}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    names = {key: name for name, part in parts.items() for key in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert detect(tmp_path)
    truth = {f"model.{key}": t for part in parts.values() for key, t in part.items()}
    same_bits(open_view(tmp_path), truth)
    (tmp_path / "second.bin").unlink()
    with pytest.raises(CheckpointError, match="second.bin is missing"):
        open_view(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code ran')",))


def test_hostile_files_run_nothing(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "odd": Hostile()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="blocked global .*exec"):
        open_view(tmp_path / "run.pt")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"model": {"w": torch.ones(2000)}}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="run.pt"):
        open_view(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"n": 1}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        open_view(tmp_path / "run.pt")
