"""A planner that is used again: what it remembers must never show in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from core_fastpersist import BalancedSavePlanner, NativeWriter

STATES: dict[str, dict[str, Any]] = {
    "the same layout": {"m": {"w": torch.ones(64, 8), "b": torch.ones(8)}, "n": 2},
    "another shape": {"m": {"w": torch.ones(65, 8), "b": torch.ones(8)}, "n": 1},
    "another dtype": {"m": {"w": torch.ones(64, 8).half(), "b": torch.ones(8)}, "n": 1},
    "a tensor more": {
        "m": {"w": torch.ones(64, 8), "b": torch.ones(8)},
        "n": 1,
        "x": torch.ones(2),
    },
    "a tensor less": {"m": {"w": torch.ones(64, 8)}, "n": 1},
    "a tensor for a number": {
        "m": {"w": torch.ones(64, 8), "b": torch.ones(8)},
        "n": torch.ones(3),
    },
    "other nesting": {"m.w": torch.ones(64, 8), "m": {"b": torch.ones(8)}, "n": 1},
}


def empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: empty(inner) for key, inner in value.items()}
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}


@pytest.mark.parametrize("what", STATES)
def test_a_second_save_holds_its_own_state(what: str, tmp_path: Path) -> None:
    planner = BalancedSavePlanner()
    first = {"m": {"w": torch.zeros(64, 8), "b": torch.zeros(8)}, "n": 1}
    for index, state in enumerate([first, first, STATES[what]]):
        folder = tmp_path / str(index)
        dcp.save(state, storage_writer=NativeWriter(folder), planner=planner)
        found = empty(state)
        dcp.load(found, checkpoint_id=folder)
        wanted, read = flat(state), flat(found)
        assert wanted.keys() == read.keys()
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, read[name]), name
                assert value.dtype == read[name].dtype
            else:
                assert value == read[name]
    stock = tmp_path / "stock"
    dcp.save(STATES[what], storage_writer=dcp.FileSystemWriter(stock))
    ours = dcp.FileSystemReader(tmp_path / "2").read_metadata()
    theirs = dcp.FileSystemReader(stock).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
