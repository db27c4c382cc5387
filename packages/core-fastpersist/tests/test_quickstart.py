"""The step in core's quickstart: really trained, really measured, really read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.contributions import Step
from core.discovery import discover
from core.hooks import Hooks
from core.recipes.quickstart import Tour
from core.recipes.train import train_model
from core.testing.fixtures import make_run

SMALL = {
    "model": "small:tiny",
    "steps": 3,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "batch_size": 2,
    "evaluate_sequences": 2,
}


@pytest.fixture
def step() -> Step:
    steps = [c.value for c in discover().collect(Hooks.core_recipes) if c.plugin == "fastpersist"]
    (found,) = steps
    assert isinstance(found, Step)
    return found


def test_it_measures_and_leaves_the_model_alone(step: Step, tmp_path: Path) -> None:
    with make_run(tmp_path / "run", plugins=discover(), train=SMALL) as run:
        trained = train_model(run)
        assert run.checkpoints.format().value.name == "fastpersist"
        before = {n: t.clone() for n, t in trained.model.state_dict().items()}
        tour = Tour(trained.model, trained.data, run.folder, trained.metrics)
        rows = list(step.main(run, tour))
        assert all(torch.equal(before[n], t) for n, t in trained.model.state_dict().items())
    *overheads, read = rows
    threads = torch.get_num_threads()
    assert len(overheads) == (1 if threads == 1 else 2)
    assert f"torch uses {threads} of {threads} threads" in overheads[0].note
    for overhead in overheads:
        assert overhead.ours.endswith("%")
        assert overhead.plain.endswith("%")
        assert "MiB" in overhead.note
        assert "of a step" in overhead.note
    count, _, of = read.ours.partition(" of ")
    assert count == of
    assert int(count) == len(before)
    assert not (run.folder / "every-step").exists()
