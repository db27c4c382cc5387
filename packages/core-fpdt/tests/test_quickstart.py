"""The step in core's quickstart: a really trained model, at a really longer sequence, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.contributions import Step
from core.discovery import discover
from core.errors import DataError, ModelError
from core.hooks import Hooks
from core.recipes.quickstart import Tour
from core.recipes.train import train_model
from core.testing.fixtures import make_run
from core_fpdt import quickstart

SMALL = {
    "model": "small:tiny",
    "steps": 2,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "batch_size": 2,
    "evaluate_sequences": 32,
}


@pytest.fixture(name="trained")
def _trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of the quickstart up to this step, with sequences as small as its model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are too small here for more
    monkeypatch.setattr(quickstart, "SHORT", 128)
    monkeypatch.setattr(quickstart, "CHUNK", 64)
    monkeypatch.setattr(quickstart, "_LOSS_CHUNK", 64 * 1024)
    with make_run(tmp_path / "run", plugins=discover(), train=SMALL) as run:
        trained = train_model(run)
        yield run, Tour(trained.model, trained.data, run.folder, trained.metrics)
    torch.set_num_threads(threads)


@pytest.fixture(name="step")
def _step() -> Step:
    (found,) = [c.value for c in discover().collect(Hooks.core_recipes) if c.plugin == "fpdt"]
    assert isinstance(found, Step)
    return found


def test_it_measures_and_leaves_the_model_alone(step: Step, trained: Any) -> None:
    run, tour = trained
    before = {name: tensor.clone() for name, tensor in tour.model.state_dict().items()}
    files = set(run.folder.iterdir())
    equal, memory, loss = step.main(run, tour)
    after = tour.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert set(run.folder.iterdir()) == files
    assert float(equal.ours) <= 1e-4
    assert memory.ours.startswith("1024 in ")
    assert memory.plain.startswith("128 in ")
    assert float(memory.ours.split()[2]) <= float(memory.plain.split()[2])
    assert "MiB of chunks wait elsewhere" in memory.note
    assert not memory.note.split("; ")[1].startswith("0.0 MiB")
    assert abs(float(loss.ours) - float(loss.plain)) < 1
    # A resumed run comes here again.
    assert len(list(step.main(run, tour))) == 3


def test_gradients_that_change_fail_the_run(
    step: Step, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tour = trained
    real = quickstart._gradients

    def broken(model: Any, ids: Any) -> Any:
        found = real(model, ids)
        if "forward" in vars(model.lm_head):
            found["model.norm.weight"] *= 1.01
        return found

    monkeypatch.setattr(quickstart, "_gradients", broken)
    with pytest.raises(ModelError, match="chunks change the gradients"):
        list(step.main(run, tour))


def test_more_memory_than_the_plain_way_fails_the_run(
    step: Step, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tour = trained
    monkeypatch.setattr(quickstart, "CHUNK", 1024)
    monkeypatch.setattr(quickstart, "_LOSS_CHUNK", 2**30)
    with pytest.raises(ModelError, match="do not fit into the memory"):
        list(step.main(run, tour))


def test_too_little_text_is_named(
    step: Step, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tour = trained
    monkeypatch.setattr(quickstart, "SHORT", 8192)
    with pytest.raises(DataError, match="65536 tokens in a row|tokens in a row are needed"):
        list(step.main(run, tour))
