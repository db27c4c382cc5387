"""A load under another plan says what is different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import core
from core.contributions import MODEL, Transform
from core.discovery import plugins_from
from core.hooks import Hooks, hookimpl, override


def nothing(model: Any, run: core.Run) -> Any:
    return model


class Plugin(Hooks):
    """Changes nothing, and stands in the plan."""

    @override
    @hookimpl
    def core_transforms(self, run: core.Run) -> list[Transform[Any]]:
        return [Transform(stage=MODEL, name="nothing", apply=nothing, claims=frozenset({"mlp"}))]


def test_the_difference_of_plans_is_told(tmp_path: Path) -> None:
    plugins = plugins_from({"demo": Plugin()})
    with core.start(folder=tmp_path, plugins=plugins, enable=["demo"], quiet=True) as run:
        run.save({"x": torch.zeros(1)}, 1).durable()
        assert run.load({"x": torch.zeros(1)}).remarks == ()
    with core.start(folder=tmp_path, quiet=True) as run:
        remarks = " ".join(run.load({"x": torch.zeros(1)}).remarks)
    assert "the plugins of the checkpoint differ" in remarks
    assert "the planned transforms of the checkpoint differ" in remarks
    assert "demo.nothing" in remarks
