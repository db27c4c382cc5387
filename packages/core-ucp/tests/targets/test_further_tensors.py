"""Tensors that belong to neither model nor optimizer keep their names, or are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources import dcp, full, megatron
from core_ucp.targets import dcp as dcp_target, megatron as megatron_target
from core_ucp.view.keys import extra_key
from core_ucp.view.view import View


@pytest.fixture
def view(tmp_path: Path) -> View:
    state = {
        "model": {"w": torch.ones(2)},
        "optim": {"state": {"w": {"exp_avg": torch.ones(2)}}},
        "noise": {"cpu": torch.arange(3)},
    }
    torch.save(state, tmp_path / "run.pt")
    found = full.open_view(tmp_path / "run.pt")
    assert "extra.noise.cpu" in found.atoms
    return found


def test_megatron_does_not_take_them_for_weights(view: View, tmp_path: Path) -> None:
    target = megatron_target.build(view)
    (tmp_path / "out").mkdir()
    execute(plan(view, target), tmp_path / "out")
    weights = [key for key in megatron.open_view(tmp_path / "out").atoms if "state" not in key]
    assert weights == ["model.w"]
    assert any("1 further tensors" in remark for remark in target.remarks)


def test_dcp_keeps_their_names(view: View, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    execute(plan(view, dcp_target.build(view)), tmp_path / "out")
    assert dcp.open_view(tmp_path / "out").atoms.keys() == view.atoms.keys()


def test_a_key_is_not_made_twice() -> None:
    """Conversions that keep all keys as they are leave them in files, where they are names."""
    assert extra_key(extra_key("noise.cpu")) == extra_key("noise.cpu") == "extra.noise.cpu"
