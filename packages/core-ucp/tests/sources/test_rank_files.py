"""Files of single ranks come together as DTensors say; plain tensors are never taken for parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.sources.ranks import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """Files of three ranks that a test may damage."""
    return Path(shutil.copytree(made / "rank_files" / "checkpoint", tmp_path / "copied"))


@pytest.mark.parametrize("case", ["rank_files", "parallel_rank_files"])
def test_every_bit_is_found(case: str, made: Path, same_bits: SameBits) -> None:
    folder = made / case / "checkpoint"
    assert detect(folder)
    view = open_view(folder)
    truth = torch.load(made / case / "truth.pt")
    generators = {key for key in view.atoms if key.startswith("extra.rng.")}
    assert len(generators) == (3 if case == "rank_files" else 0)
    for key in generators:
        del view.atoms[key]
    same_bits(view, truth)
    assert view.resume.step == 3
    assert view.resume.hyper["first.up.weight"]["weight_decay"] == 0.1


def test_the_mesh_is_told(made: Path) -> None:
    assert open_view(made / "parallel_rank_files" / "checkpoint").mesh == {"dp": 2, "tp": 2}


def test_plain_tensors_are_replicas(made: Path) -> None:
    atom = open_view(made / "rank_files" / "checkpoint").atoms["model.scale"]
    assert atom.shape == (3,)
    assert len(atom.pieces) == 1
    assert atom.replicas is not None
    assert len(atom.replicas) == 2


def test_values_of_the_run_are_kept(made: Path) -> None:
    assert open_view(made / "rank_files" / "checkpoint").resume.scheduler == {"last_epoch": 3}


def test_a_missing_rank_is_named(copied: Path) -> None:
    (copied / "optim_world_size_3_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match="optim_world_size_3_rank_2.pt is missing"):
        open_view(copied)


def test_files_of_two_runs_are_refused(copied: Path) -> None:
    shutil.copy(copied / "model_world_size_3_rank_0.pt", copied / "model_world_size_4_rank_0.pt")
    with pytest.raises(CheckpointError, match="3 and of 4 ranks"):
        open_view(copied)


def test_a_rank_that_is_there_twice_leaves_a_hole(copied: Path) -> None:
    shutil.copy(copied / "model_world_size_3_rank_0.pt", copied / "model_world_size_3_rank_1.pt")
    with pytest.raises(CheckpointError, match=r"model.*elements are missing"):
        open_view(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    path = copied / "model_world_size_3_rank_1.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model_world_size_3_rank_1.pt"):
        open_view(copied)


def test_ranks_that_disagree_are_refused(copied: Path) -> None:
    path = copied / "model_world_size_3_rank_1.pt"
    torch.save({"scale": torch.ones(4)}, path)
    with pytest.raises(CheckpointError, match=r"ranks do not agree on model.scale"):
        open_view(copied)
