"""Megatron-core loads the folders that we make, also from the form that it no longer reads."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ucp import megatron_runs

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources import dcp as dcp_source, megatron
from core_ucp.targets.megatron import MegatronOptions, build
from core_ucp.view.view import View

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow
PADDING = megatron_runs.PADDED


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


def made(view: View, folder: Path, options: MegatronOptions) -> Path:
    """Carry a conversion out, and return the folder of the iteration."""
    folder.mkdir()
    execute(plan(view, build(view, options)), folder)
    assert megatron.detect(folder)
    return next(folder.glob("iter_*"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources, what was made of them, and what Megatron-core loads from that, by case."""
    root = tmp_path_factory.mktemp("megatron")
    runs("save", str(root / "own"))
    flattened(root / "flattened")
    named(root / "named")
    padded = MegatronOptions(vocabulary_multiple=PADDING)
    made(megatron.open_view(root / "own"), root / "own-made", padded)
    made(megatron.open_view(root / "flattened"), root / "flattened-made", padded)
    half = MegatronOptions(dtype=torch.bfloat16)
    made(dcp_source.open_view(root / "named"), root / "named-made", half)
    found = {case: root / f"{case}.pt" for case in ("own", "flattened", "named")}
    pairs = ((str(next((root / f"{c}-made").glob("iter_*"))), str(f)) for c, f in found.items())
    runs("load", *itertools.chain.from_iterable(pairs))
    return {**found, "root": root}


def loaded(path: Path) -> dict[str, Any]:
    """What Megatron-core has found in a folder."""
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def assert_same(found: dict[str, Any]) -> None:
    for key, tensor in megatron_runs.truth().items():
        flat = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(found["tensors"][key].view(torch.uint8), flat), key


def test_what_megatron_saved_comes_back(folders: dict[str, Path]) -> None:
    found = loaded(folders["own"])
    assert_same(found)
    common = folders["root"] / "own" / "iter_0000007" / "common.pt"
    before = torch.load(common, weights_only=False)
    assert found["common"]["args"] == before["args"]
    assert found["common"]["iteration"] == 7
    assert found["common"]["optimizer"] == before["optimizer"]


def test_the_form_that_megatron_no_longer_reads(folders: dict[str, Path]) -> None:
    found = loaded(folders["flattened"])
    assert_same(found)
    assert found["common"]["optimizer"]["param_state_sharding_type"] == "fully_reshardable"


def test_a_state_of_dcp_in_megatrons_names(folders: dict[str, Path]) -> None:
    """Without a ``common.pt`` to carry along, ours is enough for Megatron-core to load tensors."""
    found = loaded(folders["named"])
    assert_same(found)
    (group,) = found["common"]["optimizer"]["optimizer"]["param_groups"]
    assert (group["lr"], group["wd_mult"], group["step"]) == (0.5, 0.0, 7)
    assert found["common"]["iteration"] == 7


def flattened(folder: Path) -> None:
    """Flat ranges of the optimizer, as Megatron-core 0.13 arranged them, two tensor-parallel ranks."""
    state: dict[str, torch.Tensor] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in megatron_runs.truth().items():
        if not name.startswith("optimizer.state."):
            state[name] = tensor
            continue
        key = name.replace("state.param.", "state.fp32_param.")
        state[key] = _reformulated(tensor, _grid(name.split(".", 3)[-1], tensor.dim()))
        shapes[key] = {"nd_reformulated_orig_global_shape": tuple(tensor.shape)}
    dcp.save(state, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.mcore_data = shapes
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    common = megatron_runs.common()
    common["optimizer"]["param_state_sharding_type"] = "fully_sharded_model_space"
    torch.save(common, folder / "common.pt")


def named(folder: Path) -> None:
    """What any program may have saved with DCP of a model with Megatron's names."""
    truth = megatron_runs.truth()
    names = [key for key in truth if not key.startswith("optimizer.")]
    states = {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": truth[f"optimizer.state.exp_avg.{name}"],
            "exp_avg_sq": truth[f"optimizer.state.exp_avg_sq.{name}"],
        }
        for name in names
    }
    weights = {name: truth[f"optimizer.state.param.{name}"] for name in names}
    groups = [{"params": names, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = {"state": states, "param_groups": groups}
    dcp.save({"model": weights, "optim": optimizer}, checkpoint_id=folder)


def _grid(name: str, dims: int) -> tuple[int, ...]:
    """Blocks of a tensor on two tensor-parallel ranks, and one for each layer."""
    grid = [1] * dims
    stacked = name.startswith("decoder.layers.")
    if stacked:
        grid[0] = megatron_runs.LAYERS
    dim = megatron_runs.cut(name)
    if dim is not None:
        # A gated unit is cut into the halves of both ranks.
        grid[dim + stacked] = 4 if "linear_fc1" in name else 2
    return tuple(grid)


def _reformulated(tensor: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    block = [size // count for size, count in zip(tensor.shape, grid, strict=True)]
    rows = torch.empty(*grid, torch.Size(block).numel(), dtype=tensor.dtype)
    for at in itertools.product(*map(range, grid)):
        cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, block, strict=True))
        rows[at] = tensor[cut].reshape(-1)
    return rows
