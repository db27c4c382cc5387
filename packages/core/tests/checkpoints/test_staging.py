"""Staging: what a writer may read late, and what happens when it fails before it writes."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import core
from core.contributions import CheckpointFormat
from core.discovery import plugins_from
from core.hooks import Hooks, hookimpl, override
from core.plugins import Plugins


class ZeroCopy(FileSystemWriter):
    """Hands on the live tensors, and says when it has read them."""

    go = threading.Event()

    def stage(self, state_dict: Any) -> Any:
        self.staged: Future[None] = Future()
        return state_dict

    def write_data(self, plan: Any, planner: Any) -> Any:
        ZeroCopy.go.wait(20)
        written = super().write_data(plan, planner)
        self.staged.set_result(None)
        return written


class Refuses(FileSystemWriter):
    """Cannot stage."""

    def stage(self, state_dict: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")


def zero_copy(path: Path, run: core.Run) -> ZeroCopy:
    return ZeroCopy(path)


def refuses(path: Path, run: core.Run) -> Refuses:
    return Refuses(path)


def never(path: Path) -> bool:
    return False


class Plugin(Hooks):
    """Offers a format with the given writer, preferred to all others."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @override
    @hookimpl
    def core_checkpoints(self) -> list[CheckpointFormat]:
        return [
            CheckpointFormat(
                name="late", summary="Late.", detect=never, writer=self.writer, preference=9
            )
        ]


def offering(writer: Any) -> Plugins:
    return plugins_from({"late": Plugin(writer)})


def test_live_tensors_are_read_before_the_next_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    ZeroCopy.go.clear()
    with core.start(folder=tmp_path, plugins=offering(zero_copy), quiet=True) as run:
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        wanted = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
        save = run.save({"model": model, "optimizer": optimizer}, 1)
        model(torch.randn(8, 4)).square().sum().backward()  # changes the running statistics
        threading.Timer(0.3, ZeroCopy.go.set).start()
        optimizer.step()
        assert ZeroCopy.go.is_set()
        path = save.durable()
    import torch.distributed.checkpoint as dcp

    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    dcp.load(found, checkpoint_id=path)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_writer_that_cannot_stage_is_one_clear_error(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with core.start(folder=tmp_path, plugins=offering(refuses), quiet=True) as run:
        run.save({"model": model}, 1)
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(core.CheckpointError, match="Cannot allocate memory"):
            optimizer.step()
