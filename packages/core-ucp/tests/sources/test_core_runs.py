"""What ``run.save`` of core writes opens with the names of its model and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import core
from core_ucp.sources import dcp, huggingface
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


@pytest.mark.parametrize(("form", "kind"), [("dcp", dcp), ("safetensors", huggingface)])
@pytest.mark.parametrize("names", [("model", "optimizer"), ("net", "adam")])
def test_a_checkpoint_of_core(
    form: str, kind: object, names: tuple[str, str], tmp_path: Path, same_bits: SameBits
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    state = {names[0]: model, names[1]: optimizer, "scheduler": scheduler}
    setting = f"checkpoint.format={form}"
    with core.start(folder=tmp_path / "run", set=[setting], quiet=True) as run:
        run.save({**state, "epoch": 7, "mean": torch.ones(3), "more": {"t": torch.zeros(2)}}, 2)
        run.checkpoints.wait()
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert isinstance(kind, type(dcp))
    assert kind.detect(folder)
    view: View = kind.open_view(folder)
    truth = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        states = optimizer.state[parameter]
        truth |= {f"optim.state.{name}.{key}": tensor for key, tensor in states.items()}
    truth |= {"extra.mean": torch.ones(3), "extra.more.t": torch.zeros(2)}
    generators = {key: view.atoms[key] for key in view.atoms if key.startswith("extra.rng.0.")}
    assert len(generators) >= 5
    for key in generators:
        del view.atoms[key]
    same_bits(view, truth)
    assert view.framework == "core"
    assert view.resume.step == 2
    assert view.resume.hyper["2.bias"]["betas"] == (0.8, 0.9)
    assert view.resume.scheduler["last_epoch"] == 2
    assert view.resume.client == {"epoch": 7, "more": {"t": {"tensor": "extra.more.t"}}}
