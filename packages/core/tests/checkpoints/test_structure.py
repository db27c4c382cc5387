"""What is loaded is what was saved, also where the fresh object looks different."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import core
from core.checkpoints import layout, rng


@pytest.fixture
def run(tmp_path: Path) -> Iterator[core.Run]:
    with core.start(folder=tmp_path / "run", quiet=True) as run:
        yield run


class Loader:
    """A data loader whose state grows while it is used."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_state_that_a_fresh_object_lacks_is_loaded(run: core.Run) -> None:
    used = Loader()
    used.state = {"seen": {"a": 3}, "buffer": [torch.arange(3), (torch.ones(2), None)], 7: "x"}
    run.save({"loader": used, "pending": {"queue": [torch.zeros(2)]}, "best": None}, 1).durable()
    fresh, pending = Loader(), {"old": 1}
    run.load({"loader": fresh, "pending": pending, "best": 5})
    assert fresh.state["seen"] == {"a": 3}
    assert fresh.state[7] == "x"
    assert fresh.state["buffer"][0].tolist() == [0, 1, 2]
    assert fresh.state["buffer"][1][1] is None
    assert pending.keys() == {"queue"}


def test_live_tensors_in_a_dictionary_are_filled_in_place(run: core.Run) -> None:
    run.save({"extra": {"ema": torch.ones(3)}}, 1).durable()
    ema = torch.zeros(3)
    extra = {"ema": ema}
    run.load({"extra": extra})
    assert extra["ema"] is ema
    assert ema.tolist() == [1, 1, 1]


def test_a_model_and_its_checkpoint_fit_as_a_whole_or_not_at_all(run: core.Run) -> None:
    run.save({"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}, 1).durable()
    small = nn.Sequential(nn.Linear(2, 2))
    before = small[0].weight.detach().clone()
    with pytest.raises(core.CheckpointError, match=r"takes no model\.1\.bias, model\.1\.weight"):
        run.load({"model": small})
    assert torch.equal(small[0].weight, before)


def test_a_missing_value_is_found_before_anything_changes(run: core.Run) -> None:
    model = nn.Linear(2, 2)
    run.save({"model": model}, 1).durable()
    other = nn.Linear(2, 2)
    before = other.weight.detach().clone()
    with pytest.raises(core.CheckpointError, match="it has no epoch"):
        run.load({"model": other, "epoch": 0})
    assert torch.equal(other.weight, before)


def test_names_that_collide_are_refused(run: core.Run) -> None:
    with pytest.raises(core.CheckpointError, match="cannot be told apart"):
        run.save({"m": nn.Linear(1, 1), "m.weight": torch.zeros(7)}, 1)


@pytest.mark.parametrize("saved", [False, True])
def test_saving_before_the_first_step_changes_nothing(run: core.Run, saved: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    if saved:
        run.save(state, 0).durable()
        assert not optimizer.state
        run.load(state)
    for _ in range(2):
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = nn.Linear(2, 2)
    torch.manual_seed(0)
    reference = nn.Linear(2, 2)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.1)
    for _ in range(2):
        reference(torch.ones(1, 2)).square().sum().backward()
        plain.step()
        plain.zero_grad()
    assert torch.equal(model.weight, reference.weight)


def test_what_another_program_saved_can_be_loaded(run: core.Run, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    names = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    dcp.save(dict(names), checkpoint_id=tmp_path / "stock")
    save_file(names, tmp_path / "file.safetensors")
    for foreign in ("stock", "file.safetensors"):
        other = nn.Linear(3, 2)
        torch.manual_seed(5)
        expected = torch.rand(2)
        torch.manual_seed(5)
        loaded = run.load({"model": other}, tmp_path / foreign)
        assert torch.equal(other.weight, model.weight)
        assert torch.equal(torch.rand(2), expected)
        assert (loaded.step, loaded.remarks) == (0, ())


def test_an_object_where_a_tensor_is_wanted_is_refused(run: core.Run, tmp_path: Path) -> None:
    dcp.save({"x": "text"}, checkpoint_id=tmp_path / "stock")
    with pytest.raises(core.CheckpointError, match="pickled object"):
        run.load({"x": torch.zeros(2)}, tmp_path / "stock")


def test_a_checkpoint_without_a_gpu_loads_beside_one(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save({"x": torch.ones(1)}, 1).durable()
    capture = rng.capture
    monkeypatch.setattr(rng, "capture", lambda: {**capture(), "cuda": torch.zeros(16).byte()})
    assert run.load({"x": torch.zeros(1)}).step == 1


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, checkpoint={"keep": 1}, quiet=True) as run:
        newest = run.save({"x": torch.ones(1)}, 100).durable()
        (newest / layout.MANIFEST).write_text("{")
        path = run.save({"x": torch.ones(1)}, 60).durable()
        assert path.is_dir()
        assert run.load({"x": torch.zeros(1)}).step == 60


def test_a_run_that_went_back_writes_its_steps_again(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, quiet=True) as run:
        for step in (1, 2):
            run.save({"x": torch.full((1,), float(step))}, step).durable()
        (layout.step_folder(run.checkpoints.directory, 2) / layout.MANIFEST).write_text("{")
    with core.start(folder=tmp_path, quiet=True) as run:
        assert run.load({"x": torch.zeros(1)}).step == 1
        run.save({"x": torch.full((1,), 7.0)}, 2).durable()
        x = torch.zeros(1)
        assert (run.load({"x": x}).step, x.item()) == (2, 7)
        assert len(list(run.checkpoints.directory.glob("step-00000002.abandoned-*"))) == 1
