"""A universal folder holds what went in, for this package and for torch's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from core.errors import CheckpointError
from core_ucp.execution.checking import diff, verify
from core_ucp.reader import UniversalReader
from core_ucp.sources.universal import open_view
from core_ucp.view.view import Resume


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    octets = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*octets)


def test_everything_comes_back(saved: Path, universal: Any) -> None:
    view = open_view(saved)
    assert view.resume == universal.resume
    assert view.aliases == {"head.weight": "a.weight"}
    assert view.mesh == {"dp": 4}
    assert view.details == {"converted from": "by hand", "zero stage": 2}
    assert list(view.remarks) == ["one remark"]
    assert {finding.status for finding in verify(view)} == {"ok"}
    names = {path.name for path in saved.iterdir()}
    assert {"ucp.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"} <= names


def test_the_own_reader_fills_any_tensors(saved: Path, universal: Any) -> None:
    expected = universal.tensors()
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    state["model.head.weight"] = torch.zeros(64, 33)
    reader = UniversalReader(saved)
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert all(same(state[name], tensor) for name, tensor in expected.items())
    assert same(state["model.head.weight"], expected["model.a.weight"])
    stored = sum(tensor.nbytes for tensor in state.values())
    assert reader.bytes_read == stored


def test_the_own_reader_rounds_and_reads_views(saved: Path, universal: Any) -> None:
    expected = universal.tensors()["model.a.weight"]
    storage = torch.zeros(33, 64, dtype=torch.bfloat16)
    dcp.load({"model.a.weight": storage.t()}, storage_reader=UniversalReader(saved), no_dist=True)
    assert same(storage.t().contiguous(), expected.to(torch.bfloat16))


def test_stock_torch_reads_it(saved: Path, universal: Any) -> None:
    expected = {k: v for k, v in universal.tensors().items() if v.numel()}
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    reader = HuggingFaceStorageReader(str(saved))
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    assert all(same(state[name], tensor) for name, tensor in expected.items())


def test_safetensors_opens_every_file(saved: Path, universal: Any) -> None:
    found = {}
    for path in saved.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == universal.tensors().keys()


def test_a_second_conversion_is_the_same(saved: Path, universal: Any, tmp_path: Path) -> None:
    again = open_view(universal.make(open_view(saved), tmp_path / "again"))
    assert not list(diff(open_view(saved), again))
    assert again.digests == open_view(saved).digests


def test_differences_are_told_apart(universal: Any, tmp_path: Path) -> None:
    first = universal.view_of(tmp_path / "first", universal.tensors())
    content = universal.tensors()
    content["model.a.weight"][3, 4] += 1
    content["model.b"] = content["model.b"].float()
    content["model.flags"] = content["model.flags"][:2]
    content["model.new"] = content.pop("model.empty")
    second = universal.view_of(tmp_path / "second", content)
    problems = {found.key: found.problem for found in diff(first, second)}
    assert problems == {
        "model.a.weight": "1 of 2,112 elements, the first at 103",
        "model.b": "torch.bfloat16 and torch.float32",
        "model.flags": "shape [3] and [2]",
        "model.empty": f"only in {tmp_path / 'first'}",
        "model.new": f"only in {tmp_path / 'second'}",
    }


def test_a_value_that_json_cannot_hold_is_refused_by_name(universal: Any, tmp_path: Path) -> None:
    view = universal.view_of(tmp_path / "in", universal.tensors())
    view = type(view)(**{**vars(view), "resume": Resume(client={"loader": object()})})
    with pytest.raises(CheckpointError, match=r"client\.loader"):
        universal.make(view, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_newer_version_is_refused_and_a_younger_minor_is_read(
    universal: Any, tmp_path: Path
) -> None:
    view = universal.view_of(tmp_path / "in", universal.tensors())
    path = universal.make(view, tmp_path / "out") / "ucp.json"
    content = json.loads(path.read_text())
    content["version"] = [2, 0]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"(?s)version 2\.0.*update core-ucp"):
        open_view(tmp_path / "out")
