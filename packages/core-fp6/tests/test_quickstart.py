"""The step in core's quickstart: a really trained model, really quantized, really measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.contributions import Step
from core.discovery import discover
from core.errors import ModelError
from core.hooks import Hooks
from core.recipes.quickstart import Tour
from core.recipes.train import train_model
from core.testing.fixtures import make_run
from core_fp6 import quickstart
from core_fp6.inspecting import inspect_folder

SMALL = {
    "model": "small:tiny",
    "steps": 3,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "batch_size": 2,
    "evaluate_sequences": 4,
}


@pytest.fixture(name="trained")
def _trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of the quickstart up to this step, with a small layer in the place of the wide one."""
    monkeypatch.setattr(quickstart, "_WIDE", 256)
    monkeypatch.setattr(quickstart, "_SECONDS", 0.1)
    with make_run(tmp_path / "run", plugins=discover(), train=SMALL, fp6={"group_size": 32}) as run:
        trained = train_model(run)
        yield run, Tour(trained.model, trained.data, run.folder, trained.metrics)


@pytest.fixture(name="step")
def _step() -> Step:
    steps = [c.value for c in discover().collect(Hooks.core_recipes) if c.plugin == "fp6"]
    (found,) = steps
    assert isinstance(found, Step)
    return found


def test_it_measures_and_leaves_the_model_alone(step: Step, trained: Any) -> None:
    run, tour = trained
    before = {name: tensor.clone() for name, tensor in tour.model.state_dict().items()}
    rows = {row.what: row for row in step.main(run, tour)}
    after = tour.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    size = rows["bytes of the model"]
    assert float(size.ours.split()[0]) < float(size.plain.split()[0])
    assert "e2m3-g32" in size.note
    loss = rows["held-out loss, nats per token"]
    assert abs(float(loss.ours) - float(loss.plain)) <= quickstart.BOUND
    for what in ("tokens per second, one at a time", "linear layer of 256 x 256, one token"):
        assert rows[what].ours.endswith("x")
    found = inspect_folder(run.folder / "model-fp6")
    assert not found.faults
    assert found.group_size == 32
    # A resumed run comes here again.
    assert len(list(step.main(run, tour))) == 5


def test_a_loss_that_moves_too_far_fails_the_run(
    step: Step, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tour = trained
    real = quickstart.quantize

    def broken(model: nn.Module, *words: Any) -> Any:
        report = real(model, *words)
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.data.mul_(8)
        return report

    monkeypatch.setattr(quickstart, "quantize", broken)
    # After three steps the model says next to nothing, however its weights are.
    monkeypatch.setattr(quickstart, "BOUND", 1e-6)
    with pytest.raises(ModelError, match="change what the model says"):
        list(step.main(run, tour))


def test_a_folder_that_is_not_the_model_fails_the_run(
    step: Step, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tour = trained
    with torch.no_grad():
        tour.model.get_output_embeddings().weight.mul_(1.01)
    monkeypatch.setattr(quickstart, "BOUND", 100.0)
    with pytest.raises(ModelError, match="is not the model that was quantized in memory"):
        list(step.main(run, tour))
