"""``run.load`` of what another program has saved: any names of the state, and every value by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

import core
from core.checkpoints import convert
from core.checkpoints.dcp import DcpReader
from core.testing.fixtures import make_run, plugin_of

NOTES = "notes.json"


def has_notes(path: Path) -> bool:
    return (path / NOTES).is_file()


def read(path: Path, run: core.Run) -> DcpReader:
    return DcpReader(path)


def describe(path: Path, run: core.Run) -> core.Description:
    return core.Description(**json.loads((path / NOTES).read_text()))


def opaque(path: Path, run: core.Run) -> core.Description:
    return core.Description(values={"loader": object()})


class Other(core.Hooks):
    """Reads DCP folders that another program has put its notes beside."""

    def __init__(self, describe: Callable[..., core.Description] = describe) -> None:
        self.describe = describe

    @core.hookimpl
    def core_checkpoints(self) -> Iterator[core.CheckpointFormat]:
        yield core.CheckpointFormat(
            name="other",
            summary="Checkpoints of another program.",
            detect=has_notes,
            reader=read,
            describe=self.describe,
            extends="dcp",
        )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[core.Run]:
    with make_run(tmp_path / "run", plugins=plugin_of(Other(), "other")) as run:
        yield run


class Bench:
    """A model of two layers, trained for a step by AdamW."""

    def __init__(self, seed: int, lr: float = 0.1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self) -> None:
        self.model(torch.ones(3, 4)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        states = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        found: dict[str, Any] = {f"optim.{k}": v for k, v in states.items()}
        found |= {f"model.{k}": v for k, v in get_model_state_dict(self.model).items()}
        return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def hyper(**values: object) -> dict[str, object]:
    """Hyper-parameters as a description has them."""
    names = [f"{layer}.{kind}" for layer in "01" for kind in ("weight", "bias")]
    return {f"optim.param_groups.{n}.{key}": v for n in names for key, v in values.items()}


Make = Callable[..., Path]


@pytest.fixture
def foreign(tmp_path: Path) -> Make:
    """Writes a checkpoint of another program."""

    def make(tensors: dict[str, torch.Tensor], **values: object) -> Path:
        folder = tmp_path / "foreign"
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
        (folder / NOTES).write_text(json.dumps({"step": 120, "values": values}))
        return folder

    return make


def same(left: Bench, right: Bench) -> bool:
    a, b = left.tensors(), right.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(name="saved")
def _saved() -> Bench:
    bench = Bench(0)
    bench.step()
    return bench


@pytest.mark.parametrize(
    ("model", "optimizer"), [("model", "optim"), ("net", "opt"), ("optim", "model"), ("a", "a_b")]
)
def test_the_state_calls_its_parts_as_it_likes(
    run: core.Run, foreign: Make, saved: Bench, model: str, optimizer: str
) -> None:
    folder = foreign(saved.tensors(), **hyper(lr=0.25, betas=[0.5, 0.75]))
    other = Bench(1)
    loaded = run.load({model: other.model, optimizer: other.optimizer}, folder)
    assert loaded.step == 120
    assert same(other, saved)
    (group,) = other.optimizer.param_groups
    assert (group["lr"], list(group["betas"])) == (0.25, [0.5, 0.75])


def test_training_goes_on_as_it_would_have(run: core.Run, foreign: Make, saved: Bench) -> None:
    other = Bench(1)
    run.load({"net": other.model, "opt": other.optimizer}, foreign(saved.tensors()))
    saved.step()
    other.step()
    assert same(other, saved)


def test_the_model_alone_can_be_loaded(run: core.Run, foreign: Make, saved: Bench) -> None:
    other = Bench(1)
    before = copy.deepcopy(other.optimizer.state_dict())
    loaded = run.load({"net": other.model}, foreign(saved.tensors(), **hyper(lr=0.25)))
    assert torch.equal(next(other.model.parameters()), next(saved.model.parameters()))
    assert other.optimizer.state_dict() == before
    assert loaded.remarks == ()


def test_hyper_parameters_that_it_lacks_stay_and_are_said(
    run: core.Run, foreign: Make, saved: Bench
) -> None:
    other = Bench(1, lr=0.5)
    state = {"net": other.model, "opt": other.optimizer}
    loaded = run.load(state, foreign(saved.tensors(), **hyper(weight_decay=0.75)))
    (group,) = other.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.75)
    (remark,) = loaded.remarks
    said = remark.partition("does not say ")[2].partition(":")[0].split(", ")
    assert "lr" in said
    assert "betas" in said
    assert "weight_decay" not in said


def test_several_optimizers_of_one_model(run: core.Run, foreign: Make, saved: Bench) -> None:
    values = {
        "optim.param_groups.0.weight.lr": 0.25,
        "optim.param_groups.0.bias.lr": 0.25,
        "optim.param_groups.1.weight.lr": 0.75,
        "optim.param_groups.1.bias.lr": 0.75,
    }
    other = Bench(1)
    first, second = (torch.optim.AdamW(layer.parameters()) for layer in other.model)
    state = {"net": other.model, "first": first, "second": second}
    run.load(state, foreign(saved.tensors(), **values))
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (0.25, 0.75)
    moments = saved.optimizer.state
    found = {**first.state, **second.state}
    for new, old in zip(other.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(found[new]["exp_avg"], moments[old]["exp_avg"])
        assert float(found[new]["step"]) == 1


def test_hyper_parameters_that_nobody_here_has_are_left_out_and_said(
    run: core.Run, foreign: Make, saved: Bench
) -> None:
    other = Bench(1)
    before = set(other.optimizer.param_groups[0])
    state = {"net": other.model, "opt": other.optimizer}
    loaded = run.load(state, foreign(saved.tensors(), **hyper(lr=0.25, wd_mult=0.5)))
    assert any("it says wd_mult: no optimizer" in remark for remark in loaded.remarks)
    assert set(other.optimizer.param_groups[0]) == before
    assert other.optimizer.param_groups[0]["lr"] == 0.25


def test_schedule_and_values_that_were_saved_along(
    run: core.Run, foreign: Make, saved: Bench
) -> None:
    saved.scheduler.step()
    schedule = saved.scheduler.state_dict()
    schedule.pop("lr_lambdas")
    values = {"scheduler": {**schedule, "lr_lambdas": [None]}, "epoch": 7, "note": "as it was"}
    other = Bench(1)
    progress: dict[str, Any] = {"passed": 0}
    state = {"net": other.model, "scheduler": other.scheduler, "epoch": 0, "progress": progress}
    loaded = run.load(state, foreign(saved.tensors(), **values, progress={"passed": 12}))
    assert loaded.values == {"epoch": 7}
    assert progress == {"passed": 12}
    assert other.scheduler.last_epoch == saved.scheduler.last_epoch


# Refused, and nothing changed


def refused(run: core.Run, state: dict[str, Any], folder: Path) -> str:
    tensors = [t for m in state.values() if isinstance(m, nn.Module) for t in m.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(core.CheckpointError) as caught:
        run.load(state, folder)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    return str(caught.value)


def test_what_is_missing_or_too_much_is_named_as_the_state_calls_it(
    run: core.Run, foreign: Make, saved: Bench
) -> None:
    tensors = saved.tensors()
    del tensors["model.1.bias"], tensors["optim.state.0.weight.exp_avg"]
    tensors["model.2.weight"] = tensors["optim.state.2.weight.exp_avg"] = torch.ones(2)
    other = Bench(1)
    said = refused(run, {"net": other.model, "opt": other.optimizer}, foreign(tensors))
    assert "it has no net.1.bias" in said
    assert "Sequential takes no net.2.weight" in said
    assert "it has no opt.state.0.weight.exp_avg" in said
    assert "AdamW takes no opt.state.2.weight.exp_avg" in said


def test_a_part_that_it_does_not_have_is_named(run: core.Run, foreign: Make, saved: Bench) -> None:
    said = refused(run, {"net": Bench(1).model, "epoch": 0}, foreign(saved.tensors()))
    assert "it has no epoch" in said


def test_a_weight_of_another_shape_is_named(run: core.Run, foreign: Make, saved: Bench) -> None:
    tensors = saved.tensors() | {"model.1.bias": torch.ones(5)}
    said = refused(run, {"net": Bench(1).model}, foreign(tensors))
    assert "1.bias" in said


def test_two_models_are_refused(run: core.Run, foreign: Make, saved: Bench) -> None:
    state = {"student": Bench(1).model, "teacher": Bench(2).model}
    said = refused(run, state, foreign(saved.tensors()))
    assert "several models: student, teacher" in said


def test_a_description_that_is_no_plain_value_is_refused_by_name(
    tmp_path: Path, foreign: Make, saved: Bench
) -> None:
    with make_run(tmp_path / "other", plugins=plugin_of(Other(opaque), "other")) as run:
        assert "loader" in refused(run, {"net": Bench(1).model}, foreign(saved.tensors()))


def test_rules_that_nobody_heeds_are_refused(tmp_path: Path, foreign: Make, saved: Bench) -> None:
    settings = {"rules": "mine.toml"}
    plugins = plugin_of(Other(), "other")
    with make_run(tmp_path / "ruled", plugins=plugins, checkpoint=settings) as run:
        said = refused(run, {"net": Bench(1).model}, foreign(saved.tensors()))
        assert "the rules 'mine.toml' would be ignored" in said
        # Its own checkpoints say where everything is.
        other = Bench(1)
        own = run.save({"net": other.model}, 1).durable()
        assert run.load({"net": other.model}, own).step == 1


# Converted


@pytest.mark.parametrize("to", ["dcp", "safetensors"])
def test_what_core_has_converted_loads_like_the_original(
    run: core.Run, foreign: Make, saved: Bench, tmp_path: Path, to: str
) -> None:
    folder = foreign(saved.tensors(), **hyper(lr=0.25), epoch=7)
    convert.execute(convert.plan(folder, tmp_path / "out", to, run))
    # Nobody needs to know the other program any more.
    with make_run(tmp_path / "plain") as plain:
        other = Bench(1)
        state = {"net": other.model, "opt": other.optimizer, "epoch": 0}
        loaded = plain.load(state, tmp_path / "out")
    assert (loaded.step, loaded.values) == (120, {"epoch": 7})
    assert same(other, saved)
    assert other.optimizer.param_groups[0]["lr"] == 0.25
    assert any("does not say" in remark for remark in loaded.remarks)
