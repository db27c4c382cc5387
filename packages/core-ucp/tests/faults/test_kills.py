"""``kill -9`` at every point of a conversion, and two conversions into one folder."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Core = Callable[..., Any]
POINTS = ["writing", "committing", "describing", "publishing"]


def convert(start: Any, source: Path, target: Path, point: str) -> Any:
    words = "--to", "universal", "--set", "checkpoint.storage=files"
    return start("convert", source, target, *words, point=point)


def test_a_kill_leaves_no_target_and_an_obvious_leftover(
    core: Core, saved: Any, start: Any, tmp_path: Path
) -> None:
    lives = {point: convert(start, saved.full, tmp_path / point, point) for point in POINTS}
    for life in lives.values():
        life.reach()
        life.process.kill()
        assert life.end()[0] == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert {name.partition(".tmp-")[0] for name in left} == set(POINTS)
    assert all(".tmp-" in name for name in left)
    for point in POINTS:
        # The leftover is in nobody's way.
        target = tmp_path / point
        assert core("convert", saved.full, target, "--to", "universal").code == 0
        assert core("ucp", "verify", target).code == 0
        assert core("ucp", "diff", saved.full, target).code == 0


def test_an_interrupt_leaves_nothing(saved: Any, start: Any, tmp_path: Path) -> None:
    life = convert(start, saved.full, tmp_path / "out", "writing")
    life.reach()
    assert [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    os.kill(life.process.pid, signal.SIGINT)
    life.go()
    assert life.end()[0] != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("point", ["writing", "publishing"])
def test_of_two_conversions_into_one_folder_one_wins(
    core: Core, saved: Any, start: Any, tmp_path: Path, point: str
) -> None:
    other = tmp_path / "other.pt"
    torch.save({"w": torch.arange(1000.0), **{str(i): torch.ones(i + 1) for i in range(9)}}, other)
    target = tmp_path / "out"
    sources = [saved.full, other]
    both = [convert(start, source, target, point) for source in sources]
    for life in both:
        life.reach()
    for life in both:
        life.go()
    ends = [life.end() for life in both]
    assert sorted(code for code, _, _ in ends) == [0, 2]
    for source, (code, out, err) in zip(sources, ends, strict=True):
        if code == 0:
            assert core("ucp", "diff", source, target).code == 0
        else:
            assert not out
            assert err.startswith("error: ")
            assert f"{target} exists already" in err or f"cannot create {target}" in err
            assert "Traceback" not in err
    assert core("ucp", "verify", target).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt", "out"]


def test_a_leftover_is_not_taken_for_a_universal_folder(
    core: Core, saved: Any, start: Any, tmp_path: Path
) -> None:
    life = convert(start, saved.full, tmp_path / "out", "committing")
    life.reach()
    life.process.kill()
    life.end()
    (left,) = tmp_path.iterdir()
    shutil.copytree(left, tmp_path / "renamed")
    assert "ucp.json" in core("ucp", "verify", tmp_path / "renamed", "--from", "universal").error
