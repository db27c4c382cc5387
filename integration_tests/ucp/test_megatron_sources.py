"""Folders that Megatron-core has really written open with every bit, on any layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import CheckpointError
from core_ucp.execution.gathering import item_type, read_box
from core_ucp.sources.megatron import detect, open_view
from core_ucp.view.view import View

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow
VOCABULARY = 50


def runs(*arguments: str) -> None:
    """Run Megatron-core in processes of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "megatron_runs.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("megatron")
    runs("save", str(folder))
    return folder


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors by our keys, without the padding of the vocabulary."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in torch.load(folder / "truth.pt").items():
        whole = tensor[:VOCABULARY] if "word_embeddings" in key else tensor
        if not key.startswith("optimizer.state."):
            continue
        state, _, name = key.removeprefix("optimizer.state.").partition(".")
        if state == "param":
            found[f"model.{name}"] = whole
        else:
            found[f"optim.state.{name}.{state}"] = whole
            found[f"optim.state.{name}.step"] = torch.tensor(7.0)
    return found


def assert_same(view: View, truth: Mapping[str, torch.Tensor]) -> None:
    assert view.atoms.keys() == truth.keys()
    for key, tensor in truth.items():
        atom = view.atoms[key]
        assert (atom.shape, atom.dtype) == (tuple(tensor.shape), tensor.dtype), key
        room = np.empty(atom.shape, item_type(atom.dtype.itemsize))
        read_box(view.files, atom, [0] * len(atom.shape), room)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert room.tobytes() == flat.numpy().tobytes(), key


def test_every_bit_is_found(saved: Path) -> None:
    assert detect(saved)
    assert detect(saved / "iter_0000007")
    view = open_view(saved)
    assert_same(view, expected(saved))
    truth = torch.load(saved / "truth.pt")
    assert {key.removeprefix("model.") for key in view.twins} == {
        key for key in truth if not key.startswith("optimizer.")
    }
    assert {twin.dtype for twin in view.twins.values()} == {torch.bfloat16}


def test_what_the_run_needs_is_found(saved: Path) -> None:
    view = open_view(saved)
    assert view.mesh == {"tp": 2, "pp": 1}
    assert view.resume.step == 7
    assert view.resume.scheduler == {"max_lr": 0.01, "num_steps": 448}
    assert view.resume.scaler == {"scale": 1024.0}
    assert view.resume.counters["consumed_train_samples"] == 448
    hyper = view.resume.hyper
    assert hyper["decoder.layers.mlp.linear_fc1.weight"]["weight_decay"] == 0.1
    assert hyper["decoder.layers.mlp.linear_fc2.bias"]["weight_decay"] == 0.0
    assert any("rng_state" in remark for remark in view.remarks)
    assert any("14 rows of padding" in remark for remark in view.remarks)


def test_a_missing_file_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "iter_0000007", tmp_path / "copied"))
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__1_0.distcp"):
        open_view(folder)


def test_a_missing_iteration_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copied"))
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(CheckpointError, match="iter_0000008 is missing"):
        open_view(folder)


def test_another_backend_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "iter_0000007", tmp_path / "copied"))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="zarr"):
        open_view(folder)
