"""Saving and loading through a run, in one process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import core
from core.checkpoints import layout


@pytest.fixture
def run(tmp_path: Path) -> Iterator[core.Run]:
    with core.start(folder=tmp_path / "run") as run:
        yield run


class Bench:
    """A model, its optimizer and its schedule."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, betas=(0.8, 0.9))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    @property
    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def step(self) -> float:
        loss = self.model(torch.randn(16, 4)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def test_training_goes_on_bit_for_bit(run: core.Run) -> None:
    bench = Bench()
    for _ in range(3):
        bench.step()
    run.save(bench.state, 3).durable()
    undisturbed = [bench.step() for _ in range(3)]

    other = Bench(seed=1)
    loaded = run.load(other.state)
    assert loaded.step == 3
    assert [other.step() for _ in range(3)] == undisturbed
    assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert other.scheduler.last_epoch == bench.scheduler.last_epoch


def test_all_random_generators_go_on(run: core.Run) -> None:
    random.gauss(0, 1)
    run.save({"x": torch.zeros(1)}, 1).durable()
    drawn = (random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(2).tolist())
    run.load({"x": torch.zeros(1)})
    assert (random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn


def test_a_part_of_the_state_can_be_loaded(run: core.Run) -> None:
    bench = Bench()
    run.save({**bench.state, "epoch": 7, "note": "a", "at": [1, (2.5, None)]}, 1).durable()
    model = Bench(seed=1).model
    loaded = run.load({"model": model, "epoch": 0, "at": None})
    assert loaded.values == {"epoch": 7, "at": [1, (2.5, None)]}
    assert torch.equal(model[0].weight, bench.model[0].weight)


def test_what_is_missing_is_named(run: core.Run) -> None:
    run.save({"model": nn.Linear(2, 2)}, 1).durable()
    with pytest.raises(core.CheckpointError, match=r"it has no other\.bias, other\.weight"):
        run.load({"other": nn.Linear(2, 2)})
    with pytest.raises(core.CheckpointError, match="scheduler"):
        run.load({"scheduler": Bench().scheduler})


def test_a_value_that_cannot_be_saved_is_named(run: core.Run) -> None:
    with pytest.raises(core.CheckpointError, match=r"'things\.model' is a set"):
        run.save({"things": {"model": {1, 2}}}, 1)
    with pytest.raises(core.CheckpointError, match="without its model"):
        run.save({"optimizer": Bench().optimizer}, 1)


def test_later_changes_do_not_reach_what_was_saved(run: core.Run) -> None:
    bench = Bench()
    before = bench.model[0].weight.detach().clone()
    save = run.save(bench.state, 1)
    save.staged()
    for _ in range(5):
        bench.step()
    save.durable()
    other = Bench(seed=1)
    run.load(other.state)
    assert torch.equal(other.model[0].weight, before)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, checkpoint={"keep": 2}) as run:
        for step in range(1, 6):
            run.save({"x": torch.full((1,), float(step))}, step)
    assert [step for step, _ in layout.steps(tmp_path / "checkpoints")] == [5, 4]


def test_the_newest_valid_one_is_loaded(run: core.Run) -> None:
    for step in (1, 2, 3):
        run.save({"x": torch.full((3,), float(step))}, step).durable()
    newest = layout.step_folder(run.checkpoints.directory, 3)
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (layout.step_folder(run.checkpoints.directory, 2) / layout.MANIFEST).write_text("{")
    x = torch.zeros(3)
    loaded = run.load({"x": x})
    assert (loaded.step, x.tolist()) == (1, [1, 1, 1])
    assert len(loaded.remarks) == 2
    assert data.name in loaded.remarks[0]


def test_a_named_checkpoint_that_is_damaged_is_refused(run: core.Run) -> None:
    path = run.save({"x": torch.zeros(3)}, 1).durable()
    next(path.glob("*.distcp")).unlink()
    with pytest.raises(core.CheckpointError, match="missing"):
        run.load({"x": torch.zeros(3)}, path)


def test_no_checkpoint_is_one_clear_error(run: core.Run) -> None:
    with pytest.raises(core.CheckpointError, match="no valid checkpoint"):
        run.load({"x": torch.zeros(1)})


def test_a_second_job_is_refused(run: core.Run) -> None:
    run.save({"x": torch.zeros(1)}, 1).durable()
    with core.start(folder=run.folder) as other:
        with pytest.raises(core.CheckpointError, match="another job"):
            other.save({"x": torch.zeros(1)}, 2)
        assert other.load({"x": torch.zeros(1)}).step == 1


def test_leftovers_are_removed_at_the_next_start(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-00000001.tmp-dead"
    leftover.mkdir(parents=True)
    with core.start(folder=tmp_path) as run:
        run.save({"x": torch.zeros(1)}, 2).durable()
    assert not leftover.exists()


def test_a_step_is_not_overwritten(run: core.Run) -> None:
    run.save({"x": torch.zeros(1)}, 1).durable()
    with pytest.raises(core.CheckpointError, match="exists already"):
        run.save({"x": torch.zeros(1)}, 1)


def test_the_plan_is_beside_the_weights(run: core.Run) -> None:
    path = run.save({"x": torch.zeros(1)}, 1).durable()
    written = layout.Manifest.read(path)
    assert written.run["api"] == core.API
    assert written.run["plan"] == []
    assert written.run["settings"]["checkpoint"]["keep"] == 3


def test_observers_hear_of_a_durable_checkpoint(
    run: core.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[core.Event] = []
    monkeypatch.setattr(run, "emit", heard.append)
    save = run.save({"x": torch.zeros(1)}, 4)
    run.checkpoints.wait()
    assert heard == [core.CheckpointSaved(step=4, path=save.path)]
