"""A save that fails is never reported as success, and loses nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan

import core
from core.contributions import CheckpointFormat
from core.discovery import plugins_from
from core.hooks import Hooks
from core.plugins import Plugin, Plugins, State


class FullDisk(FileSystemWriter):
    """Fails like a full disk, in the background, after it has written a part."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        (Path(self.path) / "part").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")


class Stages(FileSystemWriter):
    """Stages for itself, and says when."""

    staged = 0

    def stage(self, state_dict: Any) -> Any:
        Stages.staged += 1
        return super().stage(state_dict)


def writes_to_a_full_disk(path: Path, run: core.Run) -> FullDisk:
    return FullDisk(path)


def writes_and_stages(path: Path, run: core.Run) -> Stages:
    return Stages(path)


def never(path: Path) -> bool:
    return False


def with_formats(*formats: CheckpointFormat) -> Plugins:
    """Core and one more plugin that offers ``formats``."""

    def checkpoints() -> Iterable[CheckpointFormat]:
        return formats

    extra = Plugin(
        name="extra",
        state=State.ACTIVE,
        implementations={Hooks.core_checkpoints.__name__: checkpoints},
    )
    return Plugins([*plugins_from({}), extra])


FULL = CheckpointFormat(
    name="full", summary="Fails.", detect=never, writer=writes_to_a_full_disk, preference=9
)
STAGES = CheckpointFormat(
    name="stages", summary="Stages.", detect=never, writer=writes_and_stages, preference=9
)


def test_the_failure_comes_before_the_next_step_of_a_foreign_loop(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with core.start(folder=tmp_path, plugins=with_formats(FULL)) as run:
        save = run.save({"model": model}, 1)
        model(torch.ones(1, 2)).sum().backward()
        before = model.weight.detach().clone()
        while not save.done:
            pass
        with pytest.raises(core.CheckpointError, match="No space left"):
            optimizer.step()
        assert torch.equal(model.weight, before)
        optimizer.step()
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_the_failure_comes_at_the_wait_and_at_the_end(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, plugins=with_formats(FULL)) as run:
        save = run.save({"x": torch.zeros(1)}, 1)
        with pytest.raises(core.CheckpointError, match="No space left"):
            run.checkpoints.wait()
        with pytest.raises(core.CheckpointError, match=r"older checkpoints in .* are intact"):
            save.durable()
    run = core.start(folder=tmp_path, plugins=with_formats(FULL))
    run.save({"x": torch.zeros(1)}, 1)
    with pytest.raises(core.CheckpointError, match="No space left"):
        run.close()


def test_the_checkpoint_before_a_failed_one_stays(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, plugins=with_formats()) as run:
        run.save({"x": torch.ones(1)}, 1).durable()
    with core.start(folder=tmp_path, plugins=with_formats(FULL)) as run:
        save = run.save({"x": torch.zeros(1)}, 2)
        with pytest.raises(core.CheckpointError):
            save.durable()
        x = torch.zeros(1)
        assert run.load({"x": x}).step == 1
        assert x.item() == 1


def test_a_writer_that_stages_for_itself_is_asked_to(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, plugins=with_formats(STAGES)) as run:
        assert run.checkpoints.format().value.name == "stages"
        run.save({"x": torch.ones(1)}, 1).durable()
    assert Stages.staged == 1


class Counting(DefaultSavePlanner):
    """Counts the items it plans."""

    planned = 0

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        Counting.planned += len(plan.items)
        return plan


def counts(run: core.Run) -> Counting:
    return Counting()


def test_the_planner_of_a_format_plans(tmp_path: Path) -> None:
    planned = CheckpointFormat(
        name="planned",
        summary="Plans.",
        detect=never,
        writer=writes_and_stages,
        planner=counts,
        preference=9,
    )
    with core.start(folder=tmp_path, plugins=with_formats(planned)) as run:
        run.save({"x": torch.ones(1), "y": torch.ones(1)}, 1).durable()
    assert Counting.planned >= 2


def test_training_waits_until_the_state_is_staged(tmp_path: Path) -> None:
    """A writer that reads the live tensors late: the step must wait for it."""
    import threading
    from concurrent.futures import Future

    release = threading.Event()

    class Late(Stages):
        def stage(self, state_dict: Any) -> Any:
            future: Future[Any] = Future()

            def copy() -> None:
                release.wait(10)
                future.set_result(FileSystemWriter.stage(self, state_dict))

            threading.Thread(target=copy).start()
            return future

    late = CheckpointFormat(
        name="late",
        summary="Stages late.",
        detect=never,
        writer=lambda path, run: Late(path),
        preference=9,
    )
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    saved = model.weight.detach().clone()
    with core.start(folder=tmp_path, plugins=with_formats(late)) as run:
        save = run.save({"model": model}, 1)
        model(torch.ones(1, 2)).sum().backward()
        threading.Timer(0.2, release.set).start()
        optimizer.step()
        assert release.is_set()
        path = save.durable()
    assert not torch.equal(model.weight, saved)
    other = nn.Linear(2, 2)
    import torch.distributed.checkpoint as dcp

    target = {"model.weight": other.weight.detach()}
    dcp.load(target, checkpoint_id=path)
    assert torch.equal(target["model.weight"], saved)
    shutil.rmtree(path)


LIMITED = """
import resource, sys
import torch
import core

with core.start(folder=sys.argv[1], quiet=True) as run:
    run.save({"x": torch.ones(4)}, 1).durable()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        run.save({"x": torch.ones(2**20)}, 2).durable()
    except core.CheckpointError as error:
        print(error)
    x = torch.zeros(4)
    print(run.load({"x": x}).step, x.tolist())
print(sorted(p.name for p in run.checkpoints.directory.iterdir()))
"""


def test_a_disk_that_takes_no_more_loses_nothing(tmp_path: Path) -> None:
    """A real refusal of the kernel, in the background thread, at the file-size limit."""
    call = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    *error, loaded, found = done.stdout.splitlines()
    assert "File too large" in " ".join(error)
    assert loaded == "1 [1.0, 1.0, 1.0, 1.0]"
    assert found == "['.lock', 'step-00000001']"
