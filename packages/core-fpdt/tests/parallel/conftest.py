"""Real ranks on gloo: ``python conftest.py FILE RANK WORLD FOLDER`` is what each of them runs.

A test file has ``on_rank(folder) -> JSON value``; what each rank returned is what the test looks at. The
first rank to fail ends all of them, and so does the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

Launch = Callable[[str, int], list[Any]]
SECONDS = 150


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a file's ``on_rank`` on some ranks, once; gives what each rank returned."""

    @cache
    def run(file: str, world: int) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, file, str(rank), str(world), str(folder)],
                env=environment,
            )
            for rank in range(world)
        ]
        _wait(ranks)
        errors = sorted(folder.glob("error-*.txt"))
        assert not errors, errors[0].read_text()
        assert [rank.returncode for rank in ranks] == [0] * world, "ranks hung, and were killed"
        return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]

    return run


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            break  # the others wait for it in gloo
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.wait()


def rank_main(file: str, rank: int, world: int, folder: Path) -> None:
    """Join the others, run the file, write down what it says."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        spec = spec_from_file_location("on_rank", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules["on_rank"] = module
        spec.loader.exec_module(module)
        said = module.on_rank(folder)
        (folder / f"said-{rank}.json").write_text(json.dumps(said))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
