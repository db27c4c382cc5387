"""Real checkpoints become DCP folders that stock torch loads into three FSDP2 ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources import accelerate, dcp, ranks
from core_ucp.targets.dcp import build

pytestmark = pytest.mark.slow
SOURCES = {
    "flattened": dcp,
    "fsdp2": dcp,
    "hsdp": dcp,
    "rank_files": ranks,
    "accelerated": accelerate,
    "accelerated_fsdp2": accelerate,
}


@pytest.fixture(scope="module")
def loaded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks found in the conversion of every case."""
    root = tmp_path_factory.mktemp("converted")
    for case, source in SOURCES.items():
        view = source.open_view(made / case / "checkpoint")
        (root / case).mkdir()
        execute(plan(view, build(view)), root / case)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "makers.py"),
            "load",
            *(str(root / case) for case in SOURCES),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("case", SOURCES)
def test_every_bit_arrives(case: str, made: Path, loaded: Path) -> None:
    truth = torch.load(made / case / "truth.pt")
    found = torch.load(loaded / f"{case}.pt")
    # The scheduler of accelerate's case has reduced the rate once.
    rate = 0.001 if case == "accelerated" else 0.01
    assert found.pop("lr").tolist() == pytest.approx([rate, rate])
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        left, right = (t.reshape(-1).view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(left, right), key
