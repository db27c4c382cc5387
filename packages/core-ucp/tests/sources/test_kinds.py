"""Every real checkpoint is recognised as one kind only, and other folders as none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import CheckpointError
from core_ucp.sources import accelerate, dcp, full, huggingface, megatron, ranks

KINDS = {
    "accelerate": accelerate,
    "dcp": dcp,
    "full": full,
    "huggingface": huggingface,
    "megatron": megatron,
    "ranks": ranks,
}


def kinds_of(path: Path) -> list[str]:
    return [name for name, kind in KINDS.items() if kind.detect(path)]


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("plain", "dcp"),
        ("fsdp2", "dcp"),
        ("safetensors_shards", "huggingface"),
        ("rank_files", "ranks"),
        ("accelerated", "accelerate"),
        ("accelerated_fsdp2", "accelerate"),
    ],
)
def test_real_checkpoints(case: str, kind: str, made: Path) -> None:
    assert kinds_of(made / case / "checkpoint") == [kind]


def test_a_file_of_torch_save(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "run.pt")
    assert kinds_of(tmp_path / "run.pt") == ["full"]


def test_other_folders_and_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    assert kinds_of(tmp_path / "arrays.npz") == []
    (tmp_path / "notes.txt").write_text("nothing")
    assert kinds_of(tmp_path) == []
    assert kinds_of(tmp_path / "notes.txt") == []
    assert kinds_of(tmp_path / "missing") == []


def test_an_empty_folder_is_refused_by_all(tmp_path: Path) -> None:
    for kind in (dcp, huggingface, ranks):
        with pytest.raises(CheckpointError):
            kind.open_view(tmp_path)
