"""Disks that refuse direct I/O after all, want larger blocks, write in part, or fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import random
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import CheckpointError
from core_fastpersist import NativeReader, NativeWriter, Staging, WriteOptions, load, save, verify
from core_fastpersist.direct import alignment
from core_fastpersist.direct.alignment import Alignment, alignment_of
from core_fastpersist.storage import DirectSink, DirectSource

MODES = ["copy, process", "copy, thread", "live"]
each_mode = pytest.mark.parametrize("mode", MODES)
SMALL = WriteOptions(chunk=2**16, threads=4, ring=2**16)
pytestmark = pytest.mark.usefixtures("forget_disks")


def big_state() -> dict[str, torch.Tensor]:
    return {str(i): torch.randn(50_000 + i) for i in range(12)}


def taught(folder: Path, **known: Any) -> None:
    """Have a wrong alignment remembered for the disk of a folder."""
    alignment._known[folder.stat().st_dev] = Alignment(direct=True, **known)


def direct_here(folder: Path) -> None:
    if not alignment_of(folder).direct:
        pytest.skip(f"no direct I/O in {folder}: {alignment_of(folder).reason}")


def real_refusal(folder: Path) -> None:
    """Memory that is not aligned, and the kernel's own EINVAL in every thread at once."""
    direct_here(folder)
    taught(folder, memory=1, offset=4096)
    probe = os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    taken = False
    with contextlib.suppress(OSError):
        taken = bool(os.pwritev(probe, [memoryview(bytearray(8193))[1:4097]], 0))
    os.close(probe)
    (folder / "probe").unlink()
    if taken:
        pytest.skip("this disk takes memory that is not aligned")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_direct_io_refused_in_the_middle_changes_nothing_but_the_speed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = big_state()
    real_refusal(tmp_path)
    save(state, tmp_path / f"right-{name}", options=replace(SMALL, direct=False))
    with caplog.at_level(logging.WARNING):
        for again in range(3):
            report = save(state, tmp_path / f"{again}{name}", options=SMALL)
            assert not report.direct
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "core_fastpersist"]
    assert str(tmp_path) in warning
    assert "Invalid argument" in warning
    taught(tmp_path, memory=4096, offset=4096)
    for again in range(3):
        found = load(tmp_path / f"{again}{name}")
        assert all(torch.equal(found[key], state[key]) for key in state)
    assert (tmp_path / f"0{name}").read_bytes() == (tmp_path / f"right-{name}").read_bytes()


def test_direct_reading_refused_in_every_thread_changes_nothing(tmp_path: Path) -> None:
    state = big_state()
    save(state, tmp_path / "x.safetensors", options=SMALL)
    dcp.save(state, storage_writer=NativeWriter(tmp_path / "dcp", threads()), no_dist=True)
    for _ in range(5):
        real_refusal(tmp_path)
        live = {key: torch.zeros(len(value)) for key, value in state.items()}
        load(tmp_path / "x.safetensors", into=live)
        assert all(torch.equal(live[key], state[key]) for key in state)
        real_refusal(tmp_path)
        live = {key: torch.zeros(len(value)) for key, value in state.items()}
        dcp.load(live, storage_reader=NativeReader(tmp_path / "dcp"), no_dist=True)
        assert all(torch.equal(live[key], state[key]) for key in state)


def threads() -> Staging:
    return Staging(mode="copy", writer="thread", options=SMALL)


@each_mode
def test_a_run_goes_on_where_direct_io_is_refused(
    mode: str, training: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    real_refusal(tmp_path)
    trained = training(mode)
    for step in (1, 2):
        trained.step()
        value = trained.digest()
        trained.save(step).durable()
    trained.spoil()
    assert trained.load().step == 2
    assert trained.digest() == value


def refuses_in_the_writer_process(tools: Any, folder: str) -> None:
    """The writer process of this run finds a disk that has changed its mind."""
    import core_fastpersist.direct.remote as remote

    source = (
        "import os\n"
        "from core_fastpersist.direct import alignment, worker\n"
        "def knows(folder, was=alignment.alignment_of):\n"
        "    found = was(folder)\n"
        "    return alignment.Alignment(found.direct, 512, 512, found.reason)\n"
        "from core_fastpersist.direct import newfile\n"
        "newfile.alignment_of = knows\n"
        "worker.main()\n"
    )
    (Path(folder) / "refusing.py").write_text(source)
    popen = remote.subprocess.Popen

    def start(command: list[str], **more: Any) -> Any:
        index = command.index("-m")
        command[index : index + 2] = [str(Path(folder) / "refusing.py")]
        return popen(command, **more)

    remote.subprocess.Popen = start  # type: ignore[misc,assignment]
    trained = tools.Training(Path(folder) / "run", "copy, process")
    value = trained.digest()
    trained.save(1).durable()
    trained.spoil()
    assert trained.load().step == 1
    assert trained.digest() == value
    print(json.dumps("loaded"))


def test_direct_io_refused_in_the_writer_process(child: Callable[..., Any], disks: Any) -> None:
    started = child(refuses_in_the_writer_process, disks.ext4(64, sector=4096))
    assert started.output() == "loaded"
    text = started.err.read_text()
    assert text.count("direct I/O failed on the disk of") == 1, text
    assert "Invalid argument" in text


def test_a_disk_with_larger_sectors_than_it_was_known_for(
    disks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    disk = disks.ext4(64, sector=4096)
    taught(disk, memory=512, offset=512)
    state = {"w": torch.randn(123_457)}
    with caplog.at_level(logging.WARNING):
        save(state, disk / "x.safetensors", options=SMALL)
        save(state, disk / "y.safetensors", options=SMALL)
    assert torch.equal(load(disk / "x.safetensors")["w"], state["w"])
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "core_fastpersist"]
    assert str(disk) in warning


# Disks with sectors of 4096 bytes


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_alignment_of_a_disk_is_found(sector: int, disks: Any) -> None:
    disk = disks.ext4(64, sector=sector)
    found = alignment_of(disk)
    assert found.direct, found.reason
    assert found.offset % 4096 == 0
    assert not list(disk.iterdir())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_535, 300_001])
def test_files_of_any_size_on_sectors_of_4096_bytes(size: int, disks: Any) -> None:
    disk = disks.ext4(16, sector=4096)
    state = {"w": torch.randint(0, 255, (size,), dtype=torch.uint8), "n": [1, "two"]}
    for name in ("x.safetensors", "x.pt"):
        report = save(state, disk / name, options=SMALL)
        assert report.direct
        assert (disk / name).stat().st_size == report.bytes
        found = load(disk / name)
        assert torch.equal(found["w"], state["w"])
        assert found["n"] == [1, "two"]
    sink = DirectSink(disk / "sink", SMALL)
    sink.open("data", size)
    for begin in range(0, size, 1000):
        sink.write_at("data", begin, state["w"][begin : begin + 1000].numpy())
    sink.commit()
    assert (disk / "sink" / "data").read_bytes() == state["w"].numpy().tobytes()
    back = bytearray(size)
    source = DirectSource(disk / "sink")
    source.read_into("data", 0, back)
    source.close()
    assert bytes(back) == state["w"].numpy().tobytes()


@pytest.mark.parametrize("format", ["fastpersist", "fastpersist-safetensors"])
@each_mode
def test_a_run_on_sectors_of_4096_bytes(
    mode: str, format: str, disks: Any, training: Callable[..., Any]
) -> None:
    disk = disks.ext4(64, sector=4096)
    trained = training(mode, disk / "run", checkpoint={"format": format})
    for step in (1, 2, 3):
        trained.step()
        value = trained.digest()
        trained.save(step).durable()
    trained.spoil()
    assert trained.load().step == 3
    assert trained.digest() == value
    assert {finding.status for finding in verify(trained.folder)} <= {"ok", "warn"}
    trained.run.close()


# Writes that end early, and threads that fail


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_short_writes_and_reads_go_on_where_they_ended(seed: int, tmp_path: Path) -> None:
    numbers, lock = random.Random(seed), threading.Lock()
    write, read = os.pwritev, os.preadv
    state = big_state()
    path = tmp_path / "x.safetensors"

    def cut(buffers: Any) -> list[memoryview]:
        with lock:
            length = numbers.randrange(1, sum(memoryview(b).nbytes for b in buffers) + 1)
        kept = []
        for buffer in buffers:
            kept.append(memoryview(buffer)[:length])
            length -= kept[-1].nbytes
        return [view for view in kept if view.nbytes]

    def short(real: Any) -> Any:
        def call(descriptor: int, buffers: Any, offset: int) -> int:
            # A file system may end anywhere; a direct write or read of half a block it refuses.
            direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
            part = cut(buffers)
            whole = sum(view.nbytes for view in part) // 4096 * 4096
            if direct and whole == 0:
                return int(real(descriptor, buffers, offset))
            return int(real(descriptor, trimmed(part, whole) if direct else part, offset))

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", short(write))
        patch.setattr(os, "preadv", short(read))
        save(state, path, options=SMALL)
        found = load(path)
        assert all(torch.equal(found[key], state[key]) for key in state)
    found = load(path)
    assert all(torch.equal(found[key], state[key]) for key in state)


def trimmed(buffers: list[memoryview], length: int) -> list[memoryview]:
    kept = []
    for buffer in buffers:
        kept.append(buffer[:length])
        length -= kept[-1].nbytes
    return [view for view in kept if view.nbytes]


def breaks(nth: int, number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The ``nth`` write of the process fails."""
    count, lock, real = iter(range(10**9)), threading.Lock(), os.pwritev

    def call(descriptor: int, buffers: Any, offset: int) -> int:
        with lock:
            mine = next(count)
        if mine == nth:
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    return lambda patch: patch.setattr(os, "pwritev", call)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EDQUOT]))
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_one_write_that_fails_in_any_thread_fails_the_file(
    name: str, data: st.DataObject, number: int, tmp_path: Path
) -> None:
    state = big_state()
    chunks = sum(t.nbytes for t in state.values()) // SMALL.chunk
    path = tmp_path / name
    save({"before": torch.ones(3)}, path)
    nth = data.draw(st.integers(0, chunks))
    with pytest.MonkeyPatch.context() as patch:
        breaks(nth, number)(patch)
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            save(state, path, options=SMALL)
    assert torch.equal(load(path)["before"], torch.ones(3))
    assert [each.name for each in tmp_path.iterdir()] == [name]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(nth=st.integers(0, 20), number=st.sampled_from([errno.EIO, errno.EDQUOT]))
@pytest.mark.parametrize("writer", ["native", "sharded"])
def test_one_write_that_fails_in_any_thread_fails_the_dcp_save(
    writer: str, nth: int, number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    from core_fastpersist import SafetensorsWriter

    folder = tmp_path_factory.mktemp("dcp")
    alignment_of(folder)  # which is found by writing, too
    kind = NativeWriter if writer == "native" else SafetensorsWriter
    with pytest.MonkeyPatch.context() as patch:
        breaks(nth, number)(patch)
        with pytest.raises((CheckpointException, CheckpointError), match=os.strerror(number)):
            dcp.save(big_state(), storage_writer=kind(folder, threads()), no_dist=True)
        waiting = dcp.async_save(
            big_state(), storage_writer=kind(folder / "async", threads()), no_dist=True
        )
        waiting.result()
    assert not list(folder.glob("*.distcp"))
    assert not list(folder.glob("*.safetensors"))
    assert not (folder / ".metadata").exists()


def fails_at_every_fsync(tools: Any, folder: str, mode: str, format: str) -> None:
    """Each fsync of a save fails once, as Linux does it: the next one would succeed."""
    trained = tools.Training(folder, mode, checkpoint={"keep": 0, "format": format})
    first, told = trained.digest(), []
    trained.save(1).durable()
    real, step = os.fsync, 1
    while True:
        step += 1
        count = iter(range(10**9))

        def fsync(descriptor: int) -> None:
            if next(count) == step - 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(descriptor)

        os.fsync = fsync
        trained.step()
        try:
            trained.save(step).durable()
            break
        except CheckpointError as error:
            steps = [path.name for path in trained.folder.glob("checkpoints/step-*")]
            told.append([str(error), len(steps), sorted(tools.temporaries(trained.folder))])
        finally:
            os.fsync = real
    last = trained.digest()
    trained.load(trained.folder / "checkpoints" / "step-00000001")
    assert trained.digest() == first
    assert trained.load().step == step
    assert trained.digest() == last
    print(json.dumps(told))


@pytest.mark.parametrize("format", ["fastpersist", "fastpersist-safetensors"])
@pytest.mark.parametrize("mode", ["copy, thread", "live"])
def test_a_failed_fsync_is_never_success(
    mode: str, format: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    told = child(fails_at_every_fsync, tmp_path / "run", mode, format).output()
    assert len(told) > 5
    for text, visible, left in told[:-1]:
        assert "Input/output error" in text
        assert (visible, left) == (1, [])
    # When the last one fails, the new name stands: a whole checkpoint that nobody was promised.
    assert told[-1][1] == 2


def fails_at_fsync_of_a_file(tools: Any, folder: str, nth: int) -> None:
    path = Path(folder) / "x.safetensors"
    path.parent.mkdir()
    save({"w": torch.zeros(100_000)}, path)
    real, count = os.fsync, iter(range(10**9))

    def fsync(descriptor: int) -> None:
        if next(count) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    os.fsync = fsync
    try:
        save({"w": torch.ones(100_000)}, path)
        told = ""
    except CheckpointError as error:
        told = str(error)
    print(
        json.dumps(
            [told, load(path)["w"].unique().tolist(), [p.name for p in Path(folder).iterdir()]]
        )
    )


def test_a_failed_fsync_of_a_file_is_never_success(
    child: Callable[..., Any], tmp_path: Path
) -> None:
    started = [child(fails_at_fsync_of_a_file, tmp_path / f"out{n}", n) for n in range(4)]
    results = [each.output() for each in started]
    assert [bool(told) for told, _, _ in results] == [True, True, True, False]
    assert [value for _, value, _ in results] == [[0.0], [0.0], [1.0], [1.0]]
    assert all(left == ["x.safetensors"] for _, _, left in results)


# Disks that go


def shut_down(disk: Path) -> None:
    """Have a file system forget everything that is not durable, as in a power cut."""
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, 0x8004587D, struct.pack("I", 2))  # FS_IOC_SHUTDOWN, no log flush
    except OSError as error:
        pytest.skip(f"file systems cannot be shut down here: {error.strerror}")
    finally:
        os.close(descriptor)


@each_mode
def test_a_disk_that_fails_in_the_middle_of_a_run(
    mode: str, disks: Any, training: Callable[..., Any], tools: Any
) -> None:
    disk = disks.ext4(64)
    trained = training(mode, disk / "run", checkpoint={"keep": 2})
    first = trained.digest()
    trained.save(1).durable()
    shut_down(disk)
    trained.step()
    with pytest.raises(CheckpointError):
        trained.save(2).durable()
    with contextlib.suppress(CheckpointError):
        trained.run.close()
    disks.again(disk)
    after = training(mode, disk / "run")
    after.spoil()
    assert after.load().step == 1
    assert after.digest() == first
    after.run.close()


def saves_for_ever(tools: Any, folder: str, log: str, mode: str) -> None:
    trained = tools.Training(folder, mode, checkpoint={"keep": 2})
    for step in range(1, 10**6):
        trained.step()
        tools.append(log, f"begun {step} {trained.digest()}")
        trained.save(step).durable()
        tools.append(log, f"done {step} {trained.digest()}")


@pytest.mark.parametrize("mode", ["copy, process", "copy, thread", "live"])
def test_a_power_cut_loses_nothing_that_was_acknowledged(
    mode: str, disks: Any, child: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    disk, log = disks.ext4(64), tmp_path / "log"
    log.touch()
    life = child(saves_for_ever, disk / "run", log, mode)
    tools.until(lambda: log.read_text().count("done") > 2 or life.err.read_text())
    lines: list[str] = []
    threading.Event().wait(random.random() * 0.4)
    shut_down(disk)
    assert life.wait() == 1, "a save on a dead disk has been acknowledged"
    lines = log.read_text().splitlines()
    acknowledged = max(int(line.split()[1]) for line in lines if line.startswith("done"))
    values = {int(line.split()[1]): line.split()[2] for line in lines}
    disks.again(disk)
    trained = tools.Training(disk / "run", "copy, thread")
    trained.spoil()
    step = trained.load().step
    assert step >= acknowledged
    assert trained.digest() == values[step]
    trained.run.close()
