"""Training on several ranks, saved and resumed on any number of them, with real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
[train]
model = "small:tiny"
steps = 6
save_every = 2
evaluate_every = 0
text_limit = 100000
vocabulary = 300
sequence_length = 32
evaluate_sequences = 8
accumulate = 2
"""


def train(ranks: int, folder: Path, *more: str) -> None:
    """Run the training recipe on ``ranks`` ranks."""
    settings = folder.parent / "settings.toml"
    settings.write_text(SETTINGS)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = launch if ranks > 1 else []
    call = ["-m", "core", "run", "train", "--settings", str(settings), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *start, *call, *more],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(1, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two FSDP2 ranks that stopped after four of six steps."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    train(2, folder, "--set", "train.parallel=fsdp2")
    for left in ("step-00000006",):
        shutil.rmtree(folder / "checkpoints" / left)
    return folder


def test_two_ranks_compute_what_one_computes(alone: Path, sharded: Path) -> None:
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sharded_run_resumes(ranks: int, alone: Path, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sharded, folder)
    train(ranks, folder, "--resume")
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
    assert (folder / "checkpoints" / "step-00000006" / "manifest.json").is_file()


def test_a_single_run_resumes_under_ddp(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    train(2, folder, "--resume", "--set", "train.parallel=ddp")
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
