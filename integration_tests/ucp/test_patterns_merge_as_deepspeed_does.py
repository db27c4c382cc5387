"""Rules from ``universal_checkpoint_info`` put together what DeepSpeed's own converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_ucp.layout.averaging import mean
from core_ucp.layout.gather import Local, gather
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.patterns import from_deepspeed
from core_ucp.view.files import Files

INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.4,
    "tp_replicated_parameter_patterns": [r"\d+.norm.weight"],
    "parameter_to_average_patterns": [r"\d+.seq_norm"],
    "parameter_with_row_parallelism_patterns": [r"\d+.o.weight"],
    "vocabulary_parameter_patterns": [r"embed.weight"],
    "original_vocab_size": 9,
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+.gate_up.weight"],
    "parameter_with_sub_params": [
        {"patterns": [r"\d+.qkv.weight"], "shape": ((5, 2, 3), 4), "partition_dim": 0},
        {"patterns": [r"\d+.columns"], "shape": (4, (5, 3)), "partition_dim": 1},
    ],
    "sub_param_shard_widths": {
        r"\d+.qkv.weight": [[3, 2], [1, 1], [0, 3]],
        r"\d+.columns": [[2, 3], [3, 0]],
    },
}
OLD: dict[str, Any] = {
    **INFO,
    "universal_checkpoint_version": 0.2,
    "parameter_with_sub_params": [
        {"patterns": [r"\d+.qkv.weight"], "shape": ((4, 2, 2), 4), "partition_dim": 0},
        {"patterns": [r"\d+.columns"], "shape": (4, 2), "partition_dim": 1},
    ],
}
SAME = torch.rand(4)
CASES: list[tuple[str, dict[str, Any], list[tuple[int, ...]]]] = [
    ("0.norm.weight", INFO, [(4,), (4,)]),
    ("0.seq_norm", INFO, [(4,), (4,)]),
    ("0.o.weight", INFO, [(3, 2), (3, 4)]),
    ("embed.weight", INFO, [(6, 2), (6, 2)]),
    ("0.gate_up.weight", INFO, [(6, 2), (4, 2)]),
    ("0.qkv.weight", INFO, [(4, 4), (6, 4)]),
    ("0.columns", INFO, [(4, 5), (4, 3)]),
    ("0.qkv.weight", OLD, [(4, 4), (4, 4)]),
    ("0.columns", OLD, [(4, 2), (4, 2)]),
    ("0.up.bias", INFO, [(3,), (2,)]),
]


@pytest.mark.parametrize(
    ("name", "info", "shapes"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_parameter_is_the_one_that_deepspeed_merges(
    name: str, info: dict[str, Any], shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    converter = pytest.importorskip("deepspeed.checkpoint.ds_to_universal")
    parts = [SAME.clone() if "norm.weight" in name else torch.rand(shape) for shape in shapes]
    for rank, part in enumerate(parts):
        folder = tmp_path / "slices" / name / str(rank)
        folder.mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save(part.reshape(-1), folder / f"{state}.00")
        (tmp_path / f"rank{rank}").write_bytes(part.numpy().tobytes())
    converter.merge_tp_slices(
        info, str(tmp_path / "out"), str(tmp_path / "slices"), 2, (name, shapes)
    )
    theirs = torch.load(tmp_path / "out" / name / "fp32.pt", weights_only=False)["param"]

    mesh = Mesh({"tp": 2})
    rule = from_deepspeed(info, mesh, lossy=True).find(name)
    local = {(rank,): Local(rank, 0, shape) for rank, shape in enumerate(shapes)}
    files = Files(tmp_path, ["rank0", "rank1"])
    atom = gather(name, rule.layout, mesh, local, torch.float32, lossy=rule.lossy)
    if rule.lossy:
        assert torch.allclose(mean(name, atom, files), theirs, rtol=0, atol=1e-7)
        return
    ours = np.full(atom.shape, np.nan, np.float32)
    buffers = [files.path(rank).read_bytes() for rank in range(2)]
    pieces = atom.pieces
    for row, (start, end) in enumerate(zip(pieces.boxes.start, pieces.boxes.end, strict=True)):
        box = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
        ours[box] = np.ndarray(
            ours[box].shape,
            np.float32,
            buffers[int(pieces.file[row])],
            int(pieces.offset[row]),
            tuple(int(step) for step in pieces.stride[row]),
        )
    assert torch.equal(torch.from_numpy(ours), theirs)
