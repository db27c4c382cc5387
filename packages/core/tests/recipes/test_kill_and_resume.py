"""A run that is killed goes on bit for bit: real processes, real ``kill -9``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = {
    "model": "small:tiny",
    "steps": 24,
    "save_every": 5,
    "evaluate_every": 8,
    "text_limit": 150_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "evaluate_sequences": 16,
    "precision": "float32",
}


def command(recipe: str, folder: Path, *more: str) -> list[str]:
    sets = [part for k, v in SMALL.items() for part in ("--set", f"train.{k}={v}")]
    return [sys.executable, "-m", "core", "run", recipe, "--out", str(folder), *sets, *more]


def run(call: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout, check=False)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(command("quickstart", folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_quickstart_leaves_what_it_promises(undisturbed: Path) -> None:
    found = {path.name for path in undisturbed.iterdir()}
    promised = {"settings.json", "plan.json", "metrics.jsonl", "loss.png", "summary.json"}
    assert found >= promised | {"checkpoints", "model", "tokenizer"}
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, 25))


def test_killed_and_resumed_is_bit_for_bit_the_same(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command("quickstart", folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if list((folder / "checkpoints").glob("step-00000010")):
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (folder / "checkpoints" / "step-00000010").is_dir()

    done = run(command("quickstart", folder, "--resume"))
    assert done.returncode == 0, done.stderr
    assert metrics(folder) == metrics(undisturbed)
    weights = [f / "model" / "model.safetensors" for f in (folder, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_folder_with_a_run_is_not_overwritten(undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = run(command("train", undisturbed))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
