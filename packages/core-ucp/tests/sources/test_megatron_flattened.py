"""The optimizer form that Megatron-core wrote up to 0.14 and no longer reads: flat ranges.

The folders are made by DCP itself, in the arrangement that Megatron-core gave to its tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings, strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from core.errors import CheckpointError
from core_ucp.sources.megatron import open_view
from core_ucp.sources.megatron.flattened import restored
from core_ucp.view.boxes import untiled
from core_ucp.view.pieces import Pieces, join
from core_ucp.view.view import Atom, View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]


def reformulated(tensor: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Every block of a grid as one row, whose index is that of the block."""
    block = [size // count for size, count in zip(tensor.shape, grid, strict=True)]
    rows = torch.empty(*grid, torch.Size(block).numel(), dtype=tensor.dtype)
    for at in itertools.product(*map(range, grid)):
        cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, block, strict=True))
        rows[at] = tensor[cut].reshape(-1)
    return rows


def written(folder: Path, tensors: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]]) -> Path:
    """A folder as Megatron-core 0.13 left it, but for the number of files."""
    state = {f"optimizer.state.{key}": reformulated(*pair) for key, pair in tensors.items()}
    state |= {"layers.w": tensors["exp_avg.layers.w"][0].to(torch.bfloat16)}
    dcp.save(state, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.mcore_data = {
        f"optimizer.state.{key}": {"nd_reformulated_orig_global_shape": tuple(pair[0].shape)}
        for key, pair in tensors.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({"iteration": 5}, folder / "common.pt")
    return folder


def test_flat_ranges_become_tensors_again(tmp_path: Path, same_bits: SameBits) -> None:
    torch.manual_seed(0)
    moments = {name: torch.randn(2, 6, 4) for name in ("exp_avg", "exp_avg_sq", "fp32_param")}
    tensors = {f"{name}.layers.w": (moment, (2, 3, 1)) for name, moment in moments.items()}
    view = open_view(written(tmp_path / "out", tensors))
    truth = {f"optim.state.layers.w.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
    same_bits(view, {**truth, "model.layers.w": moments["fp32_param"]})
    assert view.resume.step == 5


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ranges_of_blocks_tile_the_tensor(data: st.DataObject) -> None:
    grid = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    block = tuple(data.draw(st.integers(1, 4)) for _ in grid)
    shape = tuple(n * count for n, count in zip(block, grid, strict=True))
    numel = torch.Size(block).numel()
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=3))})
    parts = []
    for index, at in enumerate(itertools.product(*map(range, grid))):
        for begin, end in itertools.pairwise(cuts):
            size = (*(1 for _ in grid), end - begin)
            offset = (index * numel + begin) * 4
            parts.append(Pieces.dense(size, 0, offset, 4, (*at, begin)))
    found = restored("w", Atom((*grid, numel), torch.float32, join(parts)), shape)
    assert untiled(shape, found.pieces.boxes) == ""
    rows = reformulated(torch.arange(torch.Size(shape).numel()).reshape(shape), grid).reshape(-1)
    whole = torch.empty(shape, dtype=torch.int64)
    table = found.pieces
    for row in range(len(table)):
        start, size = table.boxes.start[row], table.boxes.size[row]
        stride = (table.stride[row] // 4).tolist()
        box = tuple(slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True))
        whole[box] = torch.as_strided(rows, size.tolist(), stride, int(table.offset[row]) // 4)
    assert torch.equal(whole, torch.arange(whole.numel()).reshape(shape))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    atom = Atom((2, 6), torch.float32, Pieces.dense((2, 6), 0, 0, 4))
    with pytest.raises(CheckpointError, match="w cannot be unflattened"):
        restored("w", atom, (7,))


def test_an_optimizer_in_buffers_is_refused_with_what_to_do(tmp_path: Path) -> None:
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    dcp.save({"w": torch.ones(2), key: torch.ones(4)}, checkpoint_id=tmp_path / "out")
    (tmp_path / "out" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(CheckpointError) as caught:
        open_view(tmp_path / "out")
    assert "fully-reshardable" in caught.value.fix


def test_padding_that_is_not_zero_is_counted(tmp_path: Path, same_bits: SameBits) -> None:
    weight = torch.randn(8, 3)
    weight[6] = 0
    dcp.save({"embedding.word_embeddings.weight": weight}, checkpoint_id=tmp_path / "out")
    (tmp_path / "out" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    args = argparse.Namespace(vocab_size=5, padded_vocab_size=8)
    torch.save({"iteration": 1, "args": args}, tmp_path / "out" / "common.pt")
    view = open_view(tmp_path / "out")
    same_bits(view, {"model.embedding.word_embeddings.weight": weight[:5]})
    assert any("3 rows of padding" in r and "2 of them are not zero" in r for r in view.remarks)


def test_the_metadata_class_of_megatron_core_0_15(
    tmp_path: Path, same_bits: SameBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass that is not there when the folder is read."""
    weight = torch.randn(4, 3)
    dcp.save({"w": weight}, checkpoint_id=tmp_path / "out")
    (tmp_path / "out" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    path = tmp_path / "out" / ".metadata"
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)
    kind = dataclasses.make_dataclass(
        "MCoreMetadata",
        [("mcore_data", dict, dataclasses.field(default_factory=dict))],
        bases=(Metadata,),
    )
    kind.__module__ = name
    module.MCoreMetadata = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for end in range(name.count(".") + 1):
            part = ".".join(name.split(".")[: end + 1])
            patch.setitem(sys.modules, part, module if part == name else types.ModuleType(part))
        path.write_bytes(pickle.dumps(kind(**vars(pickle.loads(path.read_bytes())))))
    assert b"MCoreMetadata" in path.read_bytes()
    same_bits(open_view(tmp_path / "out"), {"model.w": weight})
