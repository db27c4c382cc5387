"""A rank that fails stops all ranks, at once and with its reason; then they go on together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import core
from core.contributions import CheckpointFormat
from core.discovery import plugins_from
from core.hooks import Hooks, hookimpl

class Writer(FileSystemWriter):
    fails = False

    def stage(self, state_dict):
        if Writer.fails:
            raise OSError(12, "Cannot allocate memory")
        return super().stage(state_dict)

def make(path, run):
    return Writer(path)

def works(path):
    return "not on this rank" if run_rank == 1 else ""

class Plugin(Hooks):
    @hookimpl
    def core_checkpoints(self):
        common = {"summary": "A format.", "detect": lambda path: False, "writer": make}
        yield CheckpointFormat(name="picky", preference=9, works=works, **common)
        yield CheckpointFormat(name="mine", preference=5, **common)

def attempt(what, work):
    try:
        work()
        print(f"{what}: fine", flush=True)
    except core.CoreError as error:
        print(f"{what}: {str(error).splitlines()[0]}", flush=True)

import os
run_rank = int(os.environ["RANK"])
model = nn.Linear(2, 2)
plugins = plugins_from({"extra": Plugin()})
with core.start(folder=sys.argv[1], plugins=plugins, quiet=True) as run:
    odd = {"model": model, "x": {1, 2}} if run.rank == 1 else {"model": model, "x": 1}
    attempt("value", lambda: run.save(odd, 1))
    Writer.fails = run.rank == 1
    attempt("stage", lambda: run.save({"model": model}, 2).durable())
    Writer.fails = False
    attempt("whole", lambda: run.save({"model": model}, 3).durable())
    attempt("load", lambda: run.load({"model": model}, run.checkpoints.directory / "x"))
    print("format:", run.checkpoints.format().value.name, flush=True)
"""


def test_all_ranks_fail_and_go_on_alike(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--tee=3"]
    call = [sys.executable, "-W", "ignore", *launch, str(script), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        call, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [
        [line.partition("]:")[2] for line in done.stdout.splitlines() if f"[default{rank}]" in line]
        for rank in range(2)
    ]
    zero, one = ({line.split(":")[0].strip(): line for line in lines} for lines in said)
    assert "rank 1 failed: 'x' is a set" in zero["value"]
    assert "'x' is a set" in one["value"]
    for lines in (zero, one):
        assert "Cannot allocate memory" in lines["stage"]
        assert "fine" in lines["whole"]
        assert "is no checkpoint" in lines["load"]
        assert "mine" in lines["format"]
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [".lock", "step-00000003"]
