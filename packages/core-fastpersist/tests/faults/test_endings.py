"""Forks, exits, two jobs, and what is left open."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from core.errors import CheckpointError
from core_fastpersist import (
    NativeReader,
    NativeWriter,
    SafetensorsWriter,
    Staging,
    WriteOptions,
    load,
    save,
    verify,
)

MODES = ["copy, process", "copy, thread", "live"]
FORMATS = ["fastpersist", "fastpersist-safetensors"]
each_mode = pytest.mark.parametrize("mode", MODES)
each_format = pytest.mark.parametrize("format", FORMATS)
ENDINGS = ["falls off the end", "sys.exit", "exception", "interrupt"]


def large() -> dict[str, torch.Tensor]:
    """More than a chunk of 1 MiB, so that threads share the work."""
    return {str(i): torch.full((400_000,), float(i)) for i in range(8)}


def end(how: str) -> None:
    if how == "sys.exit":
        sys.exit(3)
    if how == "exception":
        raise RuntimeError("as in a training loop")
    if how == "interrupt":
        raise KeyboardInterrupt


CODES = {"falls off the end": 0, "sys.exit": 3, "exception": 1, "interrupt": -signal.SIGINT}


# Interpreters that end with a write in flight


def saves_and_ends(tools: Any, folder: str, mode: str, format: str, how: str) -> None:
    trained = tools.Training(folder, mode, checkpoint={"format": format}, fastpersist={"chunk": 1})
    trained.run.save({"model": trained.model, "large": large()}, 1)
    end(how)


@pytest.mark.parametrize(
    ("mode", "format", "how"),
    [
        *(("copy, thread", "fastpersist", how) for how in ENDINGS),
        *(("copy, process", "fastpersist", how) for how in ENDINGS[1:]),
        ("live", "fastpersist", "sys.exit"),
        ("live", "fastpersist-safetensors", "exception"),
    ],
)
def test_a_run_that_ends_right_after_a_submit_completes_it(
    mode: str, format: str, how: str, child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    life = child(saves_and_ends, tmp_path, mode, format, how, leave="as any interpreter")
    assert life.wait() == CODES[how], life.err.read_text()
    trained = tools.Training(tmp_path, "copy, thread")
    state = {"large": {name: torch.zeros(400_000) for name in large()}}
    assert trained.run.load(state).step == 1
    assert all(torch.equal(state["large"][name], value) for name, value in large().items())
    assert not tools.temporaries(tmp_path)
    assert "Traceback" not in life.err.read_text() or how in ("exception", "interrupt")
    trained.run.close()


def saves_with_dcp_and_ends(tools: Any, folder: str, writer: str, kind: str, how: str) -> None:
    staging = Staging(mode="copy", writer=writer, options=WriteOptions(chunk=2**20))  # type: ignore[arg-type]
    made = NativeWriter if kind == "native" else SafetensorsWriter
    dcp.async_save(large(), storage_writer=made(folder, staging), no_dist=True)
    end(how)


@pytest.mark.parametrize(
    ("writer", "kind", "how"),
    [
        ("process", "native", "sys.exit"),
        ("thread", "native", "sys.exit"),
        ("thread", "native", "exception"),
        ("thread", "sharded", "falls off the end"),
    ],
)
def test_an_interpreter_that_ends_right_after_async_save_completes_it(
    writer: str, kind: str, how: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    life = child(saves_with_dcp_and_ends, folder, writer, kind, how, leave="as any interpreter")
    assert life.wait() == CODES[how], life.err.read_text()
    found = {name: torch.zeros(400_000) for name in large()}
    if kind == "native":
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    else:
        (file,) = folder.glob("*.safetensors")
        found = load(file)
    assert all(torch.equal(found[name], value) for name, value in large().items())
    assert {finding.status for finding in verify(folder)} == {"ok"}


def saves_into_nothing_and_ends(tools: Any, folder: str, mode: str) -> None:
    trained = tools.Training(folder, mode)
    trained.save(1)
    (next((Path(folder) / "checkpoints").glob("*.tmp-*"))).rename(Path(folder) / "gone")


@each_mode
def test_a_write_that_fails_at_the_end_is_told(
    mode: str, child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    life = child(saves_into_nothing_and_ends, tmp_path, mode, leave="as any interpreter")
    life.wait()
    done = list((tmp_path / "checkpoints").glob("step-*1"))
    assert done or "the checkpoint of step 1 failed" in life.err.read_text()


# Forks


def saves_and_forks(tools: Any, folder: str, mode: str, format: str) -> None:
    """Children come and go in the middle of every save and load, as data loaders do."""
    trained = tools.Training(folder, mode, checkpoint={"keep": 2, "format": format})
    values = []
    state = {**trained.state, "large": large()}
    for step in range(1, 6):
        trained.step()
        save_ = trained.run.save(state, step)
        children = [forked(state) for _ in range(4)]
        save_.durable()
        values.append(trained.digest())
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0
    trained.spoil()
    stop = threading.Event()

    def fork_on() -> None:
        while not stop.is_set():
            os.waitpid(forked({}), 0)

    forks = threading.Thread(target=fork_on)
    forks.start()
    for _ in range(5):
        trained.spoil()
        assert trained.run.load(state).step == 5
        assert trained.digest() == values[-1]
        assert all(torch.equal(state["large"][name], value) for name, value in large().items())
    stop.set()
    forks.join()
    print(json.dumps("done"))


def forked(state: dict[str, Any]) -> int:
    """A child that writes to all of its memory, which must not be its parent's."""
    pid = os.fork()
    if pid == 0:
        for tensor in state.get("large", {}).values():
            tensor.zero_()
        os._exit(0)
    return pid


@pytest.mark.parametrize(
    ("mode", "format"),
    [*((mode, "fastpersist") for mode in MODES), ("live", "fastpersist-safetensors")],
)
def test_forks_while_writing_and_reading_change_nothing(
    mode: str, format: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    assert child(saves_and_forks, tmp_path, mode, format).output() == "done"


# Two jobs


@each_format
def test_a_second_job_in_one_directory_is_refused(
    format: str, training: Callable[..., Any], tmp_path: Path
) -> None:
    first = training("copy, thread", tmp_path / "run", checkpoint={"format": format})
    value = first.digest()
    first.save(1).durable()
    second = training("copy, thread", tmp_path / "run", checkpoint={"format": format})
    second.step()
    with pytest.raises(CheckpointError, match="another job saves into"):
        second.save(2)
    first.spoil()
    assert first.load().step == 1
    assert first.digest() == value


def saves_the_same_path(tools: Any, path: str, fill: float) -> None:
    for _ in range(60):
        save({"w": torch.full((50_000,), fill)}, path)


def test_two_jobs_that_save_one_file_leave_that_of_either(
    child: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "out" / "x.safetensors"
    path.parent.mkdir()
    jobs = [child(saves_the_same_path, path, float(fill)) for fill in range(3)]
    seen = 0
    while not gone(jobs[-1].pid):
        if path.exists():
            assert len(load(path)["w"].unique()) == 1
            seen += 1
    assert seen
    for job in jobs:
        assert job.wait() == 0, job.err.read_text()
        assert not job.err.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["x.safetensors"]


def gone(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# Nothing stays open


def opened() -> tuple[int, int, int]:
    """Numbers of descriptors, of maps, and of threads."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("\n")
    return len(list(Path("/proc/self/fd").iterdir())), maps, threading.active_count()


def settled(threads: int) -> None:
    """Give threads that are ending the time to: torch's `async_save` does not join its own."""
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)


def deleted() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return [target for target in found if "(deleted)" in target and "memfd" not in target]


def saves_fifty_times(tools: Any, folder: str, what: str) -> None:
    mode, _, format = what.partition("; ")
    folder_ = Path(folder)
    if mode in tools.MODES:
        trained = tools.Training(folder_ / "run", mode, checkpoint={"keep": 1, "format": format})

        def once(step: int) -> None:
            trained.step()
            trained.save(step).durable()
            if step % 5 == 0:
                trained.load()

    elif mode == "file":

        def once(step: int) -> None:
            save({"w": torch.randn(100_000)}, folder_ / "x.safetensors")
            load(folder_ / "x.safetensors")
            load(folder_ / "x.safetensors", mmap=True)

    else:

        def once(step: int) -> None:
            state = {"w": torch.randn(100_000)}
            staging = Staging(mode="copy", writer=mode)  # type: ignore[arg-type]
            dcp.save(state, storage_writer=NativeWriter(folder_ / "dcp", staging), no_dist=True)
            dcp.async_save(
                state, storage_writer=NativeWriter(folder_ / "dcp", staging), no_dist=True
            ).result()
            dcp.load(state, storage_reader=NativeReader(folder_ / "dcp"), no_dist=True)

    for step in range(1, 6):
        once(step)
    before = opened()
    for step in range(11, 16 if mode == "process" else 61):
        once(step)
    settled(before[2])
    print(json.dumps([before, opened(), deleted()]))


@pytest.mark.parametrize(
    "what",
    [
        *(f"{mode}; fastpersist" for mode in MODES),
        "live; fastpersist-safetensors",
        "file",
        "process",
    ],
)
def test_fifty_saves_leave_nothing_open(
    what: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    before, after, kept = child(saves_fifty_times, tmp_path, what).output()
    assert after[0] <= before[0], (before, after)
    assert after[1] <= before[1] + 8, (before, after)
    assert after[2] <= before[2], (before, after)
    assert not kept


def closes_runs(tools: Any, folder: str) -> None:
    from core_fastpersist.dcp.session import session_of

    found = []
    for number in range(4):
        trained = tools.Training(f"{folder}/{number}", "copy, process")
        trained.save(1).durable()
        writer = session_of(trained.run).staging._process
        trained.run.close()
        found.append([*opened(), writer.alive])
        del trained, writer
    print(json.dumps(found))


def test_a_closed_run_has_no_process_and_leaves_nothing_open(
    child: Callable[..., Any], tmp_path: Path
) -> None:
    first, *others = child(closes_runs, tmp_path).output()
    for descriptors, maps, threads, alive in others:
        assert descriptors <= first[0]
        assert maps <= first[1] + 8
        assert threads <= first[2]
        assert not alive
