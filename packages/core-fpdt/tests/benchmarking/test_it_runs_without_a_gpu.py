"""The benchmark for GPUs does all of its parts in small on a CPU, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_parts_in_small(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run("--device", "cpu", "--tiny", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["torch"] == torch.__version__
    by_kernel = {row["kernel"]: row for row in found["kernels"] if row["tile"] == "causal"}
    assert 0 < by_kernel["cpu_flash"]["error"] < 0.02
    assert by_kernel["cpu_flash"]["forward TFLOP/s"] > 0
    assert "CUDA" in by_kernel["cudnn"]["why"]
    short, long = found["layer"]
    assert (short["length"], long["length"]) == (64, 128)
    for row in (short, long):
        slower = row["host seconds"] - row["none seconds"]
        assert row["overlap"] == pytest.approx(1 - slower / row["copy seconds"])
        assert 0 < row["host GiB"] < row["moved GiB"]
    # Every chunk of keys is fetched for all chunks behind it.
    assert long["moved GiB"] > 2 * short["moved GiB"]
    (step,) = found["model"]
    assert 0 < step["MFU"] < step["logged MFU"]
    assert "overlap" in done.stdout


def test_layers_can_share_weights(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    words = ("--device", "cpu", "--tiny", "--part", "model", "--length", "32", "--length", "no")
    done = run(*words, "--share-weights", "--project-keys", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = json.loads(file.read_text(encoding="utf-8"))["model"]
    assert good["length"] == 32
    assert bad == {"length": "no", "why": "'no' is no number of tokens"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_one_line_where_there_is_no_gpu() -> None:
    done = run()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "Error: there is no CUDA device; try --device cpu --tiny"
    assert "Traceback" not in done.stderr
