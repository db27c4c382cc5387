"""A missing file and any flipped byte of a universal folder are found, and named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import CheckpointError
from core_ucp.execution.checking import verify
from core_ucp.sources.universal import open_view


def problems(folder: Path) -> list[str]:
    """What opening and verifying finds."""
    try:
        return [found.problem for found in verify(open_view(folder)) if found.status == "bad"]
    except CheckpointError as error:
        return [str(error)]


def test_a_sound_folder_has_none(saved: Path) -> None:
    assert not problems(saved)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_flipped_byte(saved: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "copy"
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(sorted(p.name for p in saved.iterdir())))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert problems(folder), (path.name, place)
    shutil.rmtree(folder)


def test_any_missing_truncated_or_longer_file(saved: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in saved.iterdir()):
        for number, change in enumerate((None, lambda data: data[:-1], lambda data: data + b"x")):
            folder = tmp_path / f"{name}-{number}"
            shutil.copytree(saved, folder)
            path = folder / name
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change(path.read_bytes()))
            (problem,) = problems(folder)
            assert name in problem


def test_a_file_of_another_folder(saved: Path, universal: Any, tmp_path: Path) -> None:
    other = universal.tensors()
    other["model.a.weight"] += 1
    made = universal.make(universal.view_of(tmp_path / "in", other), tmp_path / "other", 8_460)
    folder = tmp_path / "mixed"
    shutil.copytree(saved, folder)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(made / name, folder / name)
    (problem,) = problems(folder)
    assert "model.a.weight is not what was saved" in problem


def test_a_damaged_folder_is_not_converted(saved: Path, universal: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    path = next(folder.glob("model-00001*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        universal.make(open_view(folder), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]
