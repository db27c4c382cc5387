"""Real ranks on gloo, forked from one process that has imported everything: ``python conftest.py``.

A test file has ``on_rank(folder) -> JSON value``; what each rank returned is what the test looks at. The
first rank to fail ends all of them, and so does the clock.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[[str, int], list[Any]]
SECONDS = 400
"""Of patience: many times what ranks take on an idle machine."""


class Launcher:
    """The process that ranks are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @cache  # noqa: B019 - one for the whole session
    def __call__(self, file: str, world: int) -> list[Any]:
        """Run a file's ``on_rank`` on some ranks, once; gives what each rank returned."""
        folder = self._folder / f"{Path(file).stem}-{world}"
        folder.mkdir()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([file, world, str(folder)]), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        if not ready:
            self.close()
        assert ready, "ranks hung, and were killed"
        ended = self._process.stdout.readline()
        errors = sorted(folder.glob("error-*.txt"))
        assert not errors, errors[0].read_text()
        assert ended == "0\n"
        return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]

    def close(self) -> None:
        """End the process and all ranks."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Generator[Launch]:
    """What runs a file's ``on_rank`` on a number of ranks."""
    launcher = Launcher(tmp_path_factory.mktemp("ranks"))
    yield launcher
    launcher.close()


def serve() -> None:
    """Fork ranks for every line of standard input; say how they ended."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        file, world, folder = json.loads(line)
        print(become_ranks(file, world, Path(folder)), flush=True)


def become_ranks(file: str, world: int, folder: Path) -> int:
    """Import a file, fork into ranks, and wait for them."""
    spec = spec_from_file_location("on_rank", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["on_rank"] = module
    spec.loader.exec_module(module)
    left = {_fork(module.on_rank, rank, world, folder) for rank in range(world)}
    code = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not code:
            code = 1
            for other in left:  # they wait for it in gloo
                os.kill(other, signal.SIGKILL)
    return code


def _fork(on_rank: Callable[[Path], Any], rank: int, world: int, folder: Path) -> int:
    if pid := os.fork():
        return pid
    import torch.distributed as dist

    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        said = on_rank(folder)
        (folder / f"said-{rank}.json").write_text(json.dumps(said))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


if __name__ == "__main__":
    serve()
