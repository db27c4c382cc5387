"""Counts in files and names that would fill the memory are told from the files that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.shards import StridedShard
from core_ucp.sources.deepspeed import open_view


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"dp_world_size": 10**6}, r"999998 of 1000000 files are missing"),
        ({"mp_world_size": 10**6}, "is incomplete"),
        ({"mp_world_size": 10**6, "dp_world_size": 10**6}, "is incomplete"),
        ({"checkpoint_parallel_dimensions": {"tp_degree": -1, "pp_degree": -1}}, "model-parallel"),
        ({"param_shapes": [{"w": (-2, -2)}]}, r"says that w is of \[-2, -2\]"),
        ({"param_shapes": [{"w": ("2", 2)}]}, r"says that w is of \['2', 2\]"),
    ],
)
def test_numbers_of_ranks_and_shapes(
    writer: Any, values: Any, tmp_path: Path, field: dict[str, Any], message: str
) -> None:
    made = writer(tmp_path / "global_step3", 2)
    groups = [{"w": values(2, 2)}]
    made.model(0, groups, **field)
    made.zero12(groups)
    with pytest.raises(CheckpointError, match=message):
        open_view(tmp_path)


def test_the_number_of_an_expert(writer: Any, values: Any, tmp_path: Path) -> None:
    made = writer(tmp_path / "global_step3", 1)
    groups = [{"w": values(2, 2)}]
    made.model(0, groups)
    made.zero12(groups)
    name = f"layer_0_expert_{10**12}_mp_rank_00_model_states.pt"
    torch.save({}, made.path / name)
    with pytest.raises(CheckpointError, match="the file of expert 0 of layer 0 is missing"):
        open_view(tmp_path)


def test_meshes_and_blocks() -> None:
    with pytest.raises(CheckpointError, match="too many ranks"):
        Mesh({"dp": 10**6, "tp": 10**6})
    with pytest.raises(CheckpointError, match="blocks"):
        StridedShard(0, "dp", 10**12)
