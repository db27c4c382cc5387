"""``kill -9`` at any moment of a save loop: what was acknowledged is there, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_fastpersist import load, save

KILLS = int(os.environ.get("CORE_FASTPERSIST_KILLS", "20"))
"""All kills together; 200 and more are for the night."""
LOOPS = ["copy, process", "copy, thread", "live", "live, safetensors", "one file"]


def saves_checkpoints(tools: Any, folder: str, log: str, mode: str) -> None:
    """Save after every step, for ever; say before it what will be saved, and after it that it is."""
    mode, _, safetensors = mode.partition(", safetensors")
    name = "fastpersist-safetensors" if safetensors or _ else "fastpersist"
    training = tools.Training(folder, mode, checkpoint={"keep": 2, "format": name})
    step = 0
    if list(Path(folder).glob("checkpoints/step-*")):
        step = training.load().step
    while True:
        step += 1
        training.step()
        tools.append(log, f"begun {step} {training.digest()}")
        training.save(step).durable()
        tools.append(log, f"done {step} {training.digest()}")


def saves_one_file(tools: Any, folder: str, log: str, mode: str) -> None:
    path = Path(folder) / "x.safetensors"
    step = int(load(path)["step"]) if path.exists() else 0
    while True:
        step += 1
        state = {"step": step, "w": torch.randn(random.randrange(1, 300_000))}
        tools.append(log, f"begun {step} {tools.digest(state)}")
        save(state, path)
        tools.append(log, f"done {step} {tools.digest(state)}")


def told(log: Path) -> tuple[int, dict[int, str]]:
    """The last step that was acknowledged, and what every step holds."""
    words = [line.split() for line in log.read_text().splitlines()]
    done = max((int(step) for word, step, _ in words if word == "done"), default=0)
    # A step that was killed is taken again from the one before, and may hold something else.
    return done, {int(step): value for _, step, value in words}


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_the_newest_acknowledged_checkpoint_survives_any_kill(
    loop: str, child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    folder, log = tmp_path / "saved", tmp_path / "log"
    folder.mkdir()
    log.touch()
    one_file = loop == "one file"
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    left: set[str] = set()
    for kill in range(-(-KILLS // len(LOOPS))):
        before = told(log)[0]
        life = child(saves_one_file if one_file else saves_checkpoints, folder, log, loop)
        tools.until(lambda: told(log)[0] > before or life.err.read_text())
        assert not left & tools.temporaries(folder), f"leftovers were not cleaned up, seed {seed}"
        time.sleep(moments.random() * 0.3)
        life.kill()
        left = tools.temporaries(folder)
        acknowledged, values = told(log)
        if one_file:
            found = load(folder / "x.safetensors")
            step, value = found["step"], tools.digest(found)
        else:
            training = tools.Training(folder, "copy, thread")
            step = training.load().step
            value = training.digest()
            training.run.close()
        assert step >= acknowledged > before, f"kill {kill} lost a checkpoint, seed {seed}"
        assert value == values[step], f"kill {kill} changed step {step}, seed {seed}"


def saves_into_one_dcp_folder(tools: Any, folder: str, log: str) -> None:
    import torch.distributed.checkpoint as dcp

    from core_fastpersist import NativeWriter, Staging

    staging = Staging(mode="copy", writer="thread")
    step = 0
    while True:
        step += 1
        state = {"w": torch.full((random.randrange(1, 300_000),), float(step))}
        tools.append(log, f"begun {step} {len(state['w'])}")
        dcp.save(state, storage_writer=NativeWriter(folder, staging), no_dist=True)
        tools.append(log, f"done {step} {len(state['w'])}")


def test_a_dcp_folder_that_is_saved_into_again_holds_the_old_or_the_new_state(
    child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    import torch.distributed.checkpoint as dcp

    from core_fastpersist import NativeReader

    for kill in range(max(3, KILLS // 20)):
        folder, log = tmp_path / f"saved{kill}", tmp_path / f"log{kill}"
        log.touch()
        life = child(saves_into_one_dcp_folder, folder, log)
        tools.until(lambda: told(log)[0] > 1 or life.err.read_text())
        time.sleep(random.random() * 0.2)
        life.kill()
        acknowledged, sizes = told(log)
        for reader in (NativeReader(folder), None):
            begun = {step: torch.zeros(int(sizes[step])) for step in (max(sizes), max(sizes) - 1)}
            size = dcp_size(folder)
            state = {"w": torch.zeros(size)}
            dcp.load(state, checkpoint_id=folder, storage_reader=reader, no_dist=True)
            (value,) = state["w"].unique().tolist()
            assert value >= acknowledged
            assert len(begun[int(value)]) == size


def dcp_size(folder: Path) -> int:
    from core_fastpersist import NativeReader

    found: Any = NativeReader(folder).read_metadata().state_dict_metadata["w"]
    return int(found.size[0])


# The writer process


def saves_with_a_process(tools: Any, folder: str, log: str) -> None:
    training = tools.Training(folder, "copy, process")
    training.save(1).durable()
    tools.append(log, str(writer_of(training).pid))
    time.sleep(600)


def writer_of(training: Any) -> Any:
    from core_fastpersist.dcp.session import session_of

    return session_of(training.run).staging._process


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_writer_process_ends_with_its_trainer(
    child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    trainer = child(saves_with_a_process, tmp_path / "run", log)
    writer = int(tools.until(lambda: log.read_text().strip()))
    assert not gone(writer)
    trainer.kill()
    tools.until(lambda: gone(writer))


def saves_and_forks(tools: Any, folder: str, log: str) -> None:
    """As a trainer with data loaders that are forked, and outlive it for a while."""
    training = tools.Training(folder, "copy, process")
    training.save(1).durable()
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
        os._exit(0)
    tools.append(log, f"{writer_of(training).pid} {worker}")
    time.sleep(600)


def test_the_writer_process_ends_with_its_trainer_whoever_else_has_its_socket(
    child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    trainer = child(saves_and_forks, tmp_path / "run", log)
    writer, worker = map(int, tools.until(lambda: log.read_text().split()))
    trainer.kill()
    try:
        tools.until(lambda: gone(writer), timeout=10)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_writer_process_killed_while_it_writes_is_an_error_with_the_signal(
    training: Callable[..., Any], tools: Any
) -> None:
    trained = training("copy, process")
    first = trained.digest()
    trained.save(1).durable()
    writer = writer_of(trained)
    os.kill(writer.pid, signal.SIGSTOP)
    trained.step()
    pending = trained.save(2)
    tools.until(writer._lock.locked)
    os.kill(writer.pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="signal 9") as error:
        pending.durable()
    assert "older checkpoints" in str(error.value)
    assert not tools.temporaries(trained.folder)
    assert [path.name for path in trained.folder.glob("checkpoints/step-*")] == ["step-00000001"]

    trained.spoil()
    assert trained.load().step == 1
    assert trained.digest() == first
    trained.step()
    second = trained.digest()
    trained.save(2).durable()
    assert writer_of(trained).pid != writer.pid
    trained.spoil()
    assert trained.load().step == 2
    assert trained.digest() == second


def test_a_killed_writer_process_stops_the_next_optimizer_step(
    training: Callable[..., Any], tools: Any
) -> None:
    trained = training("copy, process")
    trained.save(1).durable()
    writer = writer_of(trained)
    os.kill(writer.pid, signal.SIGSTOP)
    pending = trained.save(2)
    tools.until(writer._lock.locked)
    os.kill(writer.pid, signal.SIGKILL)
    tools.until(lambda: pending.done)
    with pytest.raises(CheckpointError, match="signal 9"):
        trained.step()
    assert not tools.temporaries(trained.folder)
    trained.step()


def test_a_writer_process_killed_while_idle_is_replaced(
    training: Callable[..., Any], tools: Any
) -> None:
    trained = training("copy, process")
    trained.save(1).durable()
    writer = writer_of(trained)
    os.kill(writer.pid, signal.SIGKILL)
    # Its threads may outlive what the system shows as its end.
    tools.until(lambda: not writer.alive)
    trained.step()
    value = trained.digest()
    trained.save(2).durable()
    trained.spoil()
    assert trained.load().step == 2
    assert trained.digest() == value
    assert writer_of(trained).pid != writer.pid


def test_a_writer_process_killed_at_any_moment_is_never_success(
    training: Callable[..., Any], tools: Any
) -> None:
    import threading

    trained = training("copy, process", checkpoint={"keep": 0})
    trained.model = torch.nn.Sequential(torch.nn.Linear(1000, 1000))
    trained.optimizer = torch.optim.AdamW(trained.model.parameters(), fused=True)
    trained.step = lambda: None
    trained.save(1).durable()

    def kill_the_writer() -> None:
        writer = writer_of(trained)
        if writer is not None:  # there is none between the death of one and the next save
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer.pid, signal.SIGKILL)

    for step in range(2, 10):
        kill = threading.Timer(random.random() * 0.3, kill_the_writer)
        kill.start()
        told = ""
        try:
            trained.save(step).durable()
        except CheckpointError as error:
            told = str(error)
        if told:
            assert "signal 9" in told
            assert not list(trained.folder.glob(f"checkpoints/step-*{step}*"))
        else:
            assert trained.load(trained.folder / f"checkpoints/step-{step:08d}").step == step
        kill.join()
