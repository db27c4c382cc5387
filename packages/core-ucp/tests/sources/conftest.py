"""Real checkpoints, made once for a session, and the comparison of a view with the truth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from core_ucp.execution.gathering import item_type, read_box
from core_ucp.view.view import View

CASES = (
    "plain",
    "flattened",
    "numbered",
    "fsdp2",
    "hsdp",
    "tensor_parallel",
    "safetensors_shards",
    "rank_files",
    "parallel_rank_files",
    "accelerated",
    "accelerated_fsdp2",
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(view: View, key: str) -> bytes:
    """The bits of an atom, gathered from its pieces."""
    atom = view.atoms[key]
    found = np.empty(atom.shape, item_type(atom.dtype.itemsize))
    read_box(view.files, atom, [0] * len(atom.shape), found)
    return found.tobytes()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real checkpoint of every case, which nobody changes."""
    folder = tmp_path_factory.mktemp("made")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "makers.py"), str(folder), *CASES],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def same_bits() -> Callable[[View, Mapping[str, torch.Tensor]], None]:
    """Compares all atoms of a view with whole tensors: keys, shapes, dtypes, bits."""

    def compare(view: View, truth: Mapping[str, torch.Tensor]) -> None:
        assert view.atoms.keys() == truth.keys()
        for key, tensor in truth.items():
            atom = view.atoms[key]
            assert (atom.shape, atom.dtype) == (tuple(tensor.shape), tensor.dtype), key
            assert read(view, key) == bits(tensor), key

    return compare
