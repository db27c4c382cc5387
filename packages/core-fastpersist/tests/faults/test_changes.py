"""What changes between two checkpoints, or while one is written: structure, memory, values."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.checkpoints.outline import Outlines
from core.checkpoints.state import split
from core.errors import CheckpointError
from core_fastpersist import Staging, WriteOptions, adopt, load, save
from core_fastpersist.dcp.session import session_of

MODES = ["copy, process", "copy, thread", "live"]
each_mode = pytest.mark.parametrize("mode", MODES)


# Structure


def forget(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Drop the state of parameters that are gone; without that torch itself takes it for an error."""
    for parameter in optimizer.state.keys() - set(model.parameters()):
        del optimizer.state[parameter]


def resize(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2].weight = nn.Parameter(torch.randn(12, 300))
    model[2].bias = nn.Parameter(torch.randn(12))
    optimizer.param_groups[0]["params"][4:] = [model[2].weight, model[2].bias]
    forget(model, optimizer)


def resize_in_place(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2].weight.data = torch.randn(20, 300)
    model[2].bias.data = torch.randn(20)
    for parameter in model[2].parameters():
        optimizer.state.pop(parameter)
        parameter.grad = None


def replace_by_equal_shape(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight = nn.Parameter(torch.randn(300, 64))
    optimizer.param_groups[0]["params"][0] = model[0].weight
    forget(model, optimizer)


def move(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() + 1


def other_dtype(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.register_buffer("extra", torch.ones(4, dtype=torch.float64))
    model.extra = torch.zeros(4, dtype=torch.int16)


def another_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.scale = nn.Parameter(torch.randn(3))


def another_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.append(nn.Linear(8, 3))
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.5})


def one_layer_less(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    gone = {id(parameter) for parameter in model[2].parameters()}
    del model[2]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in gone]
    forget(model, optimizer)


def layers_swapped(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2] = nn.Linear(300, 8)
    group = optimizer.param_groups[0]
    group["params"] = list(model.parameters())
    forget(model, optimizer)


def tied(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.tied = nn.Linear(64, 300)
    model.tied.weight = model[0].weight
    model.tied.bias = model[0].bias


def no_buffer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1].num_batches_tracked = None


def buffer_replaced(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1].running_mean = torch.randn(300)


def not_persistent(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.register_buffer("cache", torch.ones(5), persistent=False)


def new_state(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["momentum"] = torch.randn(2)


def state_replaced(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone() * 2


def hyperparameters(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.123
    optimizer.param_groups[0]["named"] = "later"


CHANGES = [
    resize,
    resize_in_place,
    replace_by_equal_shape,
    move,
    other_dtype,
    another_parameter,
    another_layer,
    one_layer_less,
    layers_swapped,
    tied,
    no_buffer,
    buffer_replaced,
    not_persistent,
    new_state,
    state_replaced,
    hyperparameters,
]


def equal(left: Any, right: Any) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype == right.tensors[name].dtype, name
        assert torch.equal(tensor, right.tensors[name]), name
    assert left.values == right.values
    assert left.stable == right.stable


def made() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_remembered_of_a_state_notices_every_change(
    change: Callable[..., None],
) -> None:
    model, optimizer = made()
    state = {"model": model, "optimizer": optimizer}
    outlines = Outlines()
    for _ in range(2):
        equal(split(state, outlines), split(state))
    change(model, optimizer)
    for _ in range(2):
        equal(split(state, outlines), split(state))


@pytest.mark.parametrize(
    ("mode", "adopted"),
    [("copy, process", False), ("copy, thread", True), ("live", False), ("live", True)],
)
def test_a_state_that_changes_between_checkpoints_is_saved_as_it_is(
    mode: str, adopted: bool, training: Callable[..., Any]
) -> None:
    trained = training(mode, checkpoint={"keep": 1})
    # Batch norm itself cannot load a state dict without its counter.
    for number, change in enumerate(each for each in CHANGES if each is not no_buffer):
        trained.model, trained.optimizer = made()
        if adopted:
            adopt(trained.model, trained.optimizer)
        for step in (1, 2):
            trained.save(10 * number + step).durable()
        change(trained.model, trained.optimizer)
        trained.save(10 * number + 3).durable()
        expected = trained.digest()
        trained.spoil()
        assert trained.load().step == 10 * number + 3, change.__name__
        assert trained.digest() == expected, change.__name__


@each_mode
def test_an_optimizer_whose_state_appears_later(mode: str, training: Callable[..., Any]) -> None:
    trained = training(mode)
    trained.optimizer = torch.optim.AdamW(trained.model.parameters(), fused=True)
    trained.save(1).durable()
    for step in (2, 3):
        trained.step()
        trained.save(step).durable()
    expected = trained.digest()
    trained.spoil()
    assert trained.load().step == 3
    assert trained.digest() == expected


def test_a_stale_arena_is_never_saved(tmp_path: Path) -> None:
    model, optimizer = made()
    adopt(model, optimizer)
    save(model.state_dict(), tmp_path / "x.safetensors")
    resize(model, optimizer)
    move(model, optimizer)
    save(model.state_dict(), tmp_path / "x.safetensors")
    found = load(tmp_path / "x.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


# The same path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_smaller_file_replaces_a_larger_one_and_readers_keep_theirs(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    old = {"w": torch.randn(300_000)}
    save(old, path)
    before = path.read_bytes()
    mapped = load(path, mmap=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        inode = os.fstat(file.fileno()).st_ino
        save({"w": torch.ones(7)}, path)
        assert path.stat().st_ino != inode
        assert bytes(view) == before
    assert torch.equal(mapped["w"], old["w"])
    assert path.stat().st_size < len(before)
    assert torch.equal(load(path)["w"], torch.ones(7))


# Values that change while they are written


def volatile(trained: Any, what: str) -> Callable[[], None]:
    """Something that changes between a submit and the next optimizer step."""
    if what == "average by hand":
        trained.ema = nn.Linear(64, 300)

        def change() -> None:
            with torch.no_grad():
                trained.ema.weight.lerp_(trained.model[0].weight, 0.1)

    elif what == "statistics as a parameter":
        trained.model.statistics = nn.Parameter(torch.zeros(300), requires_grad=False)

        def change() -> None:
            trained.model.statistics.data.add_(1)

    else:

        def change() -> None:
            for state in trained.optimizer.state.values():
                state["exp_avg"].mul_(0.5)

    return change


@pytest.mark.parametrize("format", ["fastpersist", "fastpersist-safetensors"])
@pytest.mark.parametrize(
    "what", ["average by hand", "statistics as a parameter", "state of an optimizer"]
)
def test_what_changes_before_the_next_optimizer_step_is_found_and_copied(
    what: str,
    format: str,
    training: Callable[..., Any],
    tools: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = training("live", checkpoint={"keep": 0, "format": format}, fastpersist={"audits": 2})
    change = volatile(trained, what)
    state = {**trained.state, **({"ema": trained.ema} if hasattr(trained, "ema") else {})}
    saved: dict[int, str] = {}

    def value() -> str:
        parts = [part.state_dict() for part in state.values() if hasattr(part, "state_dict")]
        return str(tools.digest([parts, trained.epoch]))

    with caplog.at_level(logging.INFO, "core_fastpersist"):
        for step in range(1, 6):
            trained.step()
            saved[step] = value()
            trained.run.save(state, step)
            change()
            assert value() != saved[step]
            trained.optimizer.step()  # the audit happens right before it
        trained.run.checkpoints.wait()
    found = session_of(trained.run).staging.audit.volatile
    names = {
        "average by hand": {"ema.weight"},
        "statistics as a parameter": {"model.statistics"},
        "state of an optimizer": {n for n in found if n.endswith("exp_avg")},
    }[what]
    assert found == names
    assert names
    for name in names:
        assert f"{name} changes between optimizer steps" in caplog.text
    for step, expected in saved.items():
        trained.run.load(state, trained.folder / f"checkpoints/step-{step:08d}")
        assert value() == expected, step


def test_a_fused_optimizer_alone_makes_nothing_volatile(training: Callable[..., Any]) -> None:
    trained = training("live", fastpersist={"audits": 2}, checkpoint={"keep": 0})
    values = {}
    for step in range(1, 6):
        trained.step()
        values[step] = trained.digest()
        trained.save(step)
    trained.run.checkpoints.wait()
    audit = session_of(trained.run).staging.audit
    assert not audit.volatile
    assert not audit.unproven(["model.0.weight", "optimizer.state.0.weight.exp_avg"])
    for step, value in values.items():
        trained.load(trained.folder / f"checkpoints/step-{step:08d}")
        assert trained.digest() == value


def test_bytes_that_change_between_their_digest_and_the_disk_are_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": torch.zeros(100_000), "still": torch.ones(100_000)}
    real = os.pwritev

    def late(descriptor: int, buffers: Any, offset: int) -> int:
        state["w"].add_(1)
        return real(descriptor, buffers, offset)

    # One aligned stretch, so that the bytes go to the disk from where they lie.
    monkeypatch.setattr(os, "pwritev", late)
    holder = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in state.items()})
    adopt(holder)
    state["w"] = holder["w"].data
    report = save(
        dict(holder.items()), tmp_path / "x.safetensors", options=WriteOptions(chunk=2**16)
    )
    monkeypatch.undo()
    assert report.straight > report.copied
    with pytest.raises(CheckpointError, match="x.safetensors is damaged in bytes"):
        load(tmp_path / "x.safetensors")


# Memory


def test_copies_that_do_not_fit_are_not_made_and_that_is_logged(
    training: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trained = training("live")
    session_of(trained.run).staging.mode = "auto"
    session_of(trained.run).staging.memory = 1000
    trained.step()
    value = trained.digest()
    with caplog.at_level(logging.INFO, "core_fastpersist"):
        trained.save(1).durable()
    assert "do not fit into 1,000" in caplog.text
    assert session_of(trained.run).staging._area.shared is None or (
        session_of(trained.run).staging._area.shared.size <= 1
    )
    trained.spoil()
    assert trained.load().step == 1
    assert trained.digest() == value


def test_bounded_memory_is_used_again(tmp_path: Path) -> None:
    staging = Staging(mode="copy", writer="thread")
    sizes = set()
    for _ in range(3):
        staged = staging.stage({"w": torch.randn(1000, 100)})
        sizes.add(staging._area.shared.address if staging._area.shared else 0)
        staged.release()
    assert len(sizes) == 1
    staging.close()
