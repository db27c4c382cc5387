"""Values that no program writes there are one clear error, whichever reader runs into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources.registry import open_checkpoint
from core_ucp.targets import universal
from core_ucp.targets.target import NewFile


def test_a_state_dictionary_whose_groups_are_no_groups(tmp_path: Path) -> None:
    moments = {0: {"exp_avg": torch.ones(2)}}
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"state": moments, "param_groups": [3]}}
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"run\.pt"):
        open_checkpoint(tmp_path / "run.pt")


@pytest.mark.parametrize("word", ["\u00b2", "9" * 5000, "", "../1", "iter_1"])
def test_a_note_of_megatron_that_is_no_number(word: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[1]", b'{"weight_map": {"w": 5}}'])
def test_an_index_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json|5 is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "resume", [{"step": "../../x"}, {"hyper": [1]}, {"counters": {"dict": {"a": "b"}}}]
)
def test_a_manifest_with_plain_values_of_another_kind(
    resume: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    monkeypatch.setattr(universal, "encoded_resume", lambda view: resume)
    view = open_checkpoint(tmp_path / "w.pt")
    execute(plan(view, universal.build(view)), tmp_path / "made")
    assert json.loads((tmp_path / "made" / "ucp.json").read_text())["resume"] == resume
    with pytest.raises(CheckpointError, match="resume"):
        open_checkpoint(tmp_path / "made")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_no_name_from_a_source_leaves_the_new_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="leaves the folder"):
        NewFile(name, 0)
