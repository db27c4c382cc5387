"""Saving in a training loop: what is on disk is the state at the moment of the call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.contributions import CheckpointFormat
from core.errors import CoreError
from core.hooks import Hooks, hookimpl
from core.plugins import Plugins
from core.testing.contract.check import Skip, checks_of, remark, require
from core.testing.contract.subject import Subject
from core.testing.contract.transforms import same
from core.testing.fixtures import make_run, plugin_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
    from torch.futures import Future

    from core.run import Run

_PLUGIN = "contract"
_WIDTH = 256
_LATE = 0.1
"""Seconds by which a write starts late: without them a small model is written between two steps."""


class _Trained:
    """A small model in training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(_WIDTH, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        batch = torch.linspace(-1, 1, 4 * _WIDTH).reshape(4, _WIDTH)
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def copy(self) -> dict[str, Tensor]:
        """All tensors of model and optimizer, cloned."""
        found = {f"model.{n}": p for n, p in self.model.state_dict().items()}
        for index, parameter in enumerate(self.model.parameters()):
            for name, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{index}.{name}"] = value
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def stable(subject: Subject) -> None:
    """Steps taken right after run.save() do not reach what is saved, however late it is written."""
    for fmt, run in _runs(subject):
        trained = _Trained()
        trained.step()
        wanted = trained.copy()
        save = run.save(trained.state, 1)
        for _ in range(3):
            trained.step()
        path = save.durable()
        require(not same(trained.copy(), wanted), "the optimizer did not step")
        fresh = _Trained()
        run.load(fresh.state, path)
        text = f"{fmt.name!r} saved the state after a later step; copy it before staged() returns"
        require(same(fresh.copy(), wanted), text)


def durable(subject: Subject) -> None:
    """staged() and durable() keep their word, and durable() leaves a whole checkpoint."""
    from core.checkpoints.layout import Manifest

    for fmt, run in _runs(subject):
        trained = _Trained()
        trained.step()
        save = run.save(trained.state, 7)
        save.staged()
        path = save.durable()
        require(save.done and path.is_dir(), f"{fmt.name!r}: durable() returns before it is")
        require(Manifest.read(path).step == 7, f"{fmt.name!r}: the manifest has another step")
        left = [p.name for p in path.parent.iterdir() if p != path and not p.name.startswith(".")]
        require(not left, f"{fmt.name!r} leaves {', '.join(left)} beside the checkpoint")
        require(_detects(fmt, path), f"{fmt.name!r} does not recognise its own checkpoint")


def resumes(subject: Subject) -> None:
    """A loaded run goes on exactly as the one that saved."""
    for fmt, run in _runs(subject):
        first = _Trained()
        first.step()
        path = run.save(first.state, 1).durable()
        first.step()
        second = _Trained()
        run.load(second.state, path)
        second.step()
        require(same(first.copy(), second.copy()), f"{fmt.name!r}: a resumed run goes elsewhere")


def _detects(fmt: CheckpointFormat, path: Path) -> bool:
    return fmt.reader is None or fmt.detect(path)


def _runs(subject: Subject) -> Iterator[tuple[CheckpointFormat, Run]]:
    """A run for each format that can save training state here; writing starts late in it."""
    formats = [f for f in subject.formats if f.writer is not None and f.reader is not None]
    if not formats:
        raise Skip("the plugin has no format that can be both written and read")
    refusals = []
    for fmt in formats:
        reason = fmt.works(subject.folder()) or _refusal(subject, fmt)
        if reason:
            refusals.append(f"{fmt.name!r}: {reason}")
            continue
        with _run(subject, fmt) as run:
            yield fmt, run
    if len(refusals) == len(formats):
        raise Skip("; ".join(refusals))
    for refusal in refusals:
        remark(refusal)


def _refusal(subject: Subject, fmt: CheckpointFormat) -> str:
    """Why a format cannot hold the state of a model in training, if it says so."""
    try:
        with _run(subject, fmt) as run:
            trained = _Trained()
            trained.step()
            run.save(trained.state, 1).durable()
    except CoreError as error:
        return str(error).splitlines()[0]
    return ""


def _run(subject: Subject, fmt: CheckpointFormat) -> Run:
    late = replace(fmt, name=f"late-{fmt.name}", writer=partial(_late_writer, fmt))
    extra = plugin_of(_Offering(late), _PLUGIN)[_PLUGIN]
    plugins = Plugins([*subject.plugins, extra])
    checkpoint = {"format": f"{_PLUGIN}.{late.name}"}
    return make_run(subject.folder(), plugins=plugins, checkpoint=checkpoint)


class _Offering(Hooks):
    """A plugin with one format."""

    def __init__(self, fmt: CheckpointFormat) -> None:
        self._format = fmt

    @hookimpl
    def core_checkpoints(self) -> Iterable[CheckpointFormat]:
        return (self._format,)


def _late_writer(fmt: CheckpointFormat, path: Path, run: Run) -> StorageWriter:
    """The writer of ``fmt`` itself, for it may be a stager too, with another ``write_data``."""
    assert fmt.writer is not None
    writer = fmt.writer(path, run)
    at_once = writer.write_data

    def late(plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        time.sleep(_LATE)
        return at_once(plan, planner)

    setattr(writer, "write_data", late)  # noqa: B010 # mypy forbids to assign a method
    return writer


CHECKS = checks_of("saves", stable, durable, resumes)
