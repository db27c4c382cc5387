"""Real ranks on gloo: ``python conftest.py FILE WORLD FOLDER`` becomes as many of them.

A test file has ``on_rank(folder) -> JSON value``; what each rank returned is what the test looks at. The
first rank to fail ends all of them, and so does the clock.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[[str, int], list[Any]]
SECONDS = 400
"""Of patience: many times what ranks take on an idle machine."""


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a file's ``on_rank`` on some ranks, once; gives what each rank returned."""

    @cache
    def run(file: str, world: int) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ranks = subprocess.Popen(
            [sys.executable, __file__, file, str(world), str(folder)],
            env=environment,
            start_new_session=True,
        )
        try:
            ranks.wait(SECONDS)
        finally:
            if ranks.poll() is None:
                os.killpg(ranks.pid, signal.SIGKILL)
                ranks.wait()
        errors = sorted(folder.glob("error-*.txt"))
        assert not errors, errors[0].read_text()
        assert ranks.returncode == 0
        return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]

    return run


def become_ranks(file: str, world: int, folder: Path) -> int:
    """Import everything once, fork into ranks, and wait for them."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    spec = spec_from_file_location("on_rank", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["on_rank"] = module
    spec.loader.exec_module(module)
    ranks = [_fork(module.on_rank, rank, world, folder) for rank in range(world)]
    left = set(ranks)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:  # they wait for it in gloo
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


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
    sys.exit(become_ranks(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
