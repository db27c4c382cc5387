"""Real processes to kill, real disks to fill, and a small training run whose every bit is known.

Processes are forked from one that has torch imported, so that hundreds of them cost little. What a
child runs is a function of the test file; it gets this module for its tools.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import core
from core.testing.fixtures import plugin_of
from core_fastpersist.dcp import native, reader, session, shards  # noqa: F401 # for the children
from core_fastpersist.direct import alignment
from core_fastpersist.files import loading, storing  # noqa: F401
from core_fastpersist.plugin import Plugin

MODES: dict[str, dict[str, Any]] = {
    "copy, process": {"mode": "copy", "writer": "process"},
    "copy, thread": {"mode": "copy", "writer": "thread"},
    "live": {"mode": "live", "audits": 0},
}
"""Settings of the section ``[fastpersist]`` that differ in who writes, and from where."""


class Training:
    """A run with a small model that trains, and can tell a digest of all that it saves."""

    def __init__(self, folder: str | Path, mode: str, **sections: Any) -> None:
        self.folder = Path(folder)
        extra = sections.pop("fastpersist", {})
        self.run = core.start(
            folder=folder,
            plugins=plugin_of(Plugin(), "fastpersist"),
            quiet=True,
            fastpersist={**MODES[mode], **extra},
            **sections,
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.epoch = {"passed": 0}
        self.step()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "epoch": self.epoch}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 64)).square().mean().backward()
        self.optimizer.step()
        self.epoch["passed"] += 1

    def save(self, step: int) -> Any:
        return self.run.save(self.state, step)

    def digest(self) -> str:
        return digest([self.model.state_dict(), self.optimizer.state_dict(), self.epoch])

    def spoil(self) -> None:
        """Overwrite everything, so that only a load brings it back."""
        with torch.no_grad():
            for tensor in leaves([self.model.state_dict(), self.optimizer.state_dict()]):
                tensor.fill_(7)

    def load(self, path: Path | None = None) -> Any:
        return self.run.load(self.state, path)


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of a tree."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key])
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves(item)


def digest(tree: Any) -> str:
    """A digest of the bits of all tensors of a tree, and of the numbers in it."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in leaves(tree):
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update(repr(list(plain(tree))).encode())
    return found.hexdigest()


def plain(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from plain(tree[key])
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from plain(item)
    elif not isinstance(tree, torch.Tensor):
        yield tree


def append(path: str | Path, line: str) -> None:
    """Add a line to a file; it is durable when this returns."""
    with Path(path).open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def temporaries(folder: Path) -> set[str]:
    """Whatever an unfinished save has in a folder."""
    return {path.name for path in folder.rglob("*") if ".tmp-" in path.name}


def free(folder: Path) -> int:
    """Bytes that can be written in a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill(folder: Path, leave: int) -> None:
    """Take all the room of a disk but some bytes."""
    with (folder / "ballast").open("ab") as file:
        while (more := free(folder) - leave) > 0:
            os.posix_fallocate(file.fileno(), file.tell(), more)
            file.seek(0, os.SEEK_END)


def fill_slowly(folder: Path, leave: int) -> None:
    """As :func:`fill`, for a file system that cannot reserve."""
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(free(folder) - leave))


def end_writer(training: Training) -> None:
    """End the writer process of a run; the next checkpoint starts another."""
    session.session_of(training.run).staging._end_process()


# Children


@dataclass
class Child:
    """A process under the zygote."""

    pid: int
    out: Path
    err: Path
    zygote: Zygote
    code: int | None = None

    def wait(self, timeout: float = 60) -> int:
        """Its exit code; minus the signal that has killed it."""
        if self.code is None:
            self.code = self.zygote.ask({"wait": self.pid, "timeout": timeout})
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
                self.code = self.zygote.ask({"wait": self.pid, "timeout": 10})
                raise AssertionError(f"still running after {timeout} s: {self.err.read_text()}")
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            assert self.wait() == -signal.SIGKILL, self.err.read_text()

    def output(self) -> Any:
        """The JSON that it has printed, once it has ended well."""
        assert self.wait() == 0, self.err.read_text()
        return json.loads(self.out.read_text())


class Zygote:
    """The process that children are forked from."""

    def __init__(self) -> None:
        load = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{load}; conftest.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


def serve() -> None:
    """What the zygote does: fork children and wait for them."""
    import hypothesis  # noqa: F401 # test files import it

    gc.collect()
    gc.freeze()  # so that no child takes all of torch apart when it ends
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_waited(**request)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(request)
            return
        print(json.dumps(pid), flush=True)


def _waited(wait: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        pid, status = os.waitpid(wait, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run the function of a test file; taking torch apart at the end is left out where it can be."""
    for number, path in enumerate([os.devnull, request["out"], request["err"]]):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115 # it stays open
    spec = importlib.util.spec_from_file_location("child", request["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = functools.partial(getattr(module, request["function"]), sys.modules["conftest"])
    if request["leave"] == "as any interpreter":
        run(*request["arguments"])
        return
    code = 0
    try:
        run(*request["arguments"])
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def until(condition: Callable[[], Any], timeout: float = 60) -> Any:
    """Wait for something to become true, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
    return found


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def child(zygote: Zygote, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start a function of the test file, ``function(tools, *arguments)``, in a process of its own."""
    started: list[Child] = []

    def start(function: Callable[..., Any], *arguments: Any, leave: str = "at once") -> Child:
        name = uuid.uuid4().hex[:8]
        out, err = tmp_path / f"{name}.out", tmp_path / f"{name}.err"
        out.touch()
        err.touch()
        request = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "arguments": [str(a) if isinstance(a, Path) else a for a in arguments],
            "leave": leave,
            "out": str(out),
            "err": str(err),
        }
        found = Child(zygote.ask(request), out, err, zygote)
        started.append(found)
        return found

    yield start
    for each in started:
        each.kill()


# Disks


@dataclass
class Disks:
    """File systems of their own, which go when the test ends, however it ends."""

    folder: Path
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def tmpfs(self, kib: int, *options: str) -> Path:
        target = self._target()
        self._mount("-t", "tmpfs", "-o", ",".join([f"size={kib}k", *options]), "none", str(target))
        self.undo.callback(_unmount, target)
        return target

    def ext4(self, mib: int, *features: str, sector: int = 512) -> Path:
        """An ext4 file system on a loop device with logical sectors of ``sector`` bytes."""
        image = self.folder / f"{uuid.uuid4().hex[:8]}.img"
        with image.open("wb") as file:
            file.truncate(mib * 2**20)
        found = self._call("losetup", "-f", "--show", "-b", str(sector), str(image))
        device = found.strip()
        self.undo.callback(subprocess.run, ["losetup", "-d", device], check=False)
        self._call("mkfs.ext4", "-q", "-b", "4096", "-m", "0", *features, device)
        target = self._target()
        self._mount(device, str(target))
        self.undo.callback(_unmount, target)
        shutil.rmtree(target / "lost+found")
        return target

    def again(self, target: Path) -> None:
        """Unmount and mount what :meth:`ext4` has made, as after a power cut."""
        device = _device(target)
        _unmount(target)
        done = subprocess.run(
            ["mount", device, str(target)], capture_output=True, text=True, check=False
        )
        # It was mounted before: a file system that cannot be mounted again is lost, not absent.
        assert done.returncode == 0, done.stderr

    def _target(self) -> Path:
        if os.geteuid() != 0:
            pytest.skip("file systems are mounted by root only")
        target = self.folder / f"disk-{uuid.uuid4().hex[:8]}"
        target.mkdir()
        return target

    def _mount(self, *arguments: str) -> None:
        self._call("mount", *arguments)

    def _call(self, *command: str) -> str:
        if os.geteuid() != 0 or shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} needs root, and has to be there")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine cannot {' '.join(command[:3])}: {done.stderr.strip()}")
        return done.stdout


def _device(target: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next(fields[0] for fields in mounts if fields[1] == str(target))


def _unmount(target: Path) -> None:
    if subprocess.run(["umount", target], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "-l", target], check=False)
    # Device numbers are given out again, to disks that are another.
    alignment._known.clear()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    found = Disks(tmp_path)
    with found.undo:
        yield found


# Tools


@pytest.fixture
def tools() -> ModuleType:
    """This module."""
    return sys.modules[Training.__module__]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Make a run, as :class:`Training` does; it is closed when the test ends."""
    made: list[Training] = []

    def make(mode: str = "copy, thread", folder: Path | None = None, **sections: Any) -> Training:
        made.append(Training(folder or tmp_path / "run", mode, **sections))
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(core.errors.CheckpointError):
            each.run.close()


@pytest.fixture
def forget_disks() -> Iterator[None]:
    """Whatever a test has taught about alignments is forgotten."""
    before = dict(alignment._known)
    yield
    alignment._known.clear()
    alignment._known.update(before)
