"""Checkpoints of one run in another format than the settings name, as a comparison needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import core
from core.checkpoints.layout import Manifest
from core.checkpoints.manager import Checkpoints
from core.testing.fixtures import make_run


def test_one_run_writes_two_formats(tmp_path: Path) -> None:
    state = {"x": torch.arange(3.0)}
    with make_run(tmp_path / "run", checkpoint={"format": "dcp"}) as run:
        other = Checkpoints(run, tmp_path / "other", format="safetensors")
        first, second = run.save(state, 1).durable(), other.save(state, 1).durable()
        room = {"x": torch.zeros(3)}
        other.load(room)
        other.close()
    assert [Manifest.read(p).format for p in (first, second)] == ["dcp", "safetensors"]
    assert torch.equal(room["x"], state["x"])


def test_a_format_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with make_run(tmp_path) as run:
        other = Checkpoints(run, tmp_path / "other", format="safetensor")
        with pytest.raises(core.PluginError, match="did you mean 'safetensors'"):
            other.save({"x": torch.zeros(1)}, 1)
        other.close()
