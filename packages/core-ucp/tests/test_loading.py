"""``run.load`` of what other programs have saved: nothing is converted, everything comes along."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import core as host
from core.checkpoints.convert import detect
from core.testing.fixtures import make_run, plugin_of
from core_ucp.plugin import Plugin

FORMS = ["full", "universal", "deepspeed", "megatron", "torch-dcp", "dcp", "safetensors"]


class Fresh:
    """The model of ``saved`` with other weights, and its optimizer with other settings."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.5, weight_decay=0.5)

    @property
    def state(self) -> dict[str, Any]:
        return {"net": self.model, "opt": self.optimizer}

    def require(self, truth: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, truth[f"model.{name}"]), name
            for state, tensor in self.optimizer.state[parameter].items():
                assert torch.equal(tensor, truth[f"optim.state.{name}.{state}"]), (name, state)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[host.Run]:
    with make_run(tmp_path / "run", plugins=plugin_of(Plugin(), "ucp")) as run:
        yield run


@pytest.fixture
def folder(saved: Any, core: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of the trained state, in any format."""

    def make(form: str) -> Path:
        if form in ("full", "universal"):
            found: Path = getattr(saved, form)
            return found
        said = core("convert", saved.full, tmp_path / form, "--to", form)
        assert said.code == 0, said
        return tmp_path / form

    return make


@pytest.mark.parametrize("form", FORMS)
def test_everything_comes_along(
    run: host.Run, saved: Any, folder: Callable[[str], Path], form: str
) -> None:
    fresh = Fresh()
    loaded = run.load(fresh.state, folder(form))
    fresh.require(saved.truth)
    assert loaded.step == 1
    (group,) = fresh.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.1)


def test_values_that_were_saved_along(run: host.Run, saved: Any) -> None:
    fresh = Fresh()
    loaded = run.load({**fresh.state, "note": ""}, saved.full)
    assert loaded.values == {"note": "as it was"}


def test_a_stock_dcp_folder_with_hyper_parameters(run: host.Run, saved: Any) -> None:
    fresh = Fresh()
    run.load(fresh.state, saved.dcp)
    fresh.require(saved.truth)
    (group,) = fresh.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.1)


def test_a_dcp_folder_with_notes_of_somebody_else_is_not_taken(
    run: host.Run, saved: Any, tmp_path: Path
) -> None:
    assert detect(saved.dcp, run).value.name == "torch-dcp"
    shutil.copytree(saved.dcp, tmp_path / "copy")
    (tmp_path / "copy" / ".metadata.digests.json").touch()
    assert detect(tmp_path / "copy", run).value.name == "dcp"


def test_damage_is_one_error_with_its_reason(run: host.Run, saved: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved.universal, copy)
    (file,) = copy.glob("model*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(host.CheckpointError, match="is not what was saved"):
        run.load(Fresh().state, copy)


def test_a_rules_file_of_the_settings_is_heeded(saved: Any, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[lens]]\nkind = 'rename'\nmatch = '{n**}'\nto = 'inner.{n}'\n")
    plugins = plugin_of(Plugin(), "ucp")
    with make_run(tmp_path / "run", plugins=plugins, checkpoint={"rules": str(rules)}) as run:
        fresh = Fresh()
        outer = nn.ModuleDict({"inner": fresh.model})
        run.load({"net": outer, "opt": fresh.optimizer}, saved.full)
        fresh.require(saved.truth)
        with pytest.raises(host.CheckpointError, match=r"it has no net\.0\.bias"):
            run.load({"net": fresh.model}, saved.full)
