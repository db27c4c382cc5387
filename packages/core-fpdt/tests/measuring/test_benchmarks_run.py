"""The benchmarks search, judge and write what they say; figures themselves are not tested."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ("--hidden", "32", "--layers", "1", "--vocabulary", "300", "--chunk", "64")
NAMES = ("trials", "lengths", "speed")


@pytest.fixture(name="scripts")
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scripts as modules, as they see each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_the_search_finds_the_longest(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = scripts["trials"].Result
    room = {"plain": 3000, "checkpointing": 100, "chunks in files": 10**9}

    def measured(way: str, tokens: int, *_: Any, **__: Any) -> Any:
        return result(tokens <= room[way], tokens)

    monkeypatch.setattr(scripts["lengths"], "measure", measured)

    def search(way: str) -> tuple[int, Any]:
        found: tuple[int, Any] = scripts["lengths"].longest(
            way, scripts["trials"].Subject(), 1, first=512, most=2**16, precision=0.1
        )
        return found

    length, tried = search("plain")
    assert length <= 3000 < length + max(64, 0.1 * length) + 64
    assert all(each.fits is (tokens <= 3000) for tokens, each in tried.items())
    assert search("checkpointing") == (0, {512: result(False, 512)})
    assert search("chunks in files")[0] == 2**16


@pytest.mark.parametrize(("ours", "status"), [(16 * 512, 0), (8 * 512, 1)])
def test_lengths_are_judged(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: int, status: int
) -> None:
    pytest.importorskip("matplotlib")
    lengths, result = scripts["lengths"], scripts["trials"].Result
    room = {"plain": 512, "chunks in files": ours}
    monkeypatch.setattr(
        lengths, "measure", lambda way, tokens, *_, **__: result(tokens <= room[way], tokens)
    )
    files = tmp_path / "lengths.json", tmp_path / "lengths.png"
    said = CliRunner().invoke(
        lengths.main,
        [
            "--way",
            "plain",
            "--way",
            "chunks in files",
            "--json",
            str(files[0]),
            "--plot",
            str(files[1]),
        ],
    )
    assert said.exit_code == status, said.output
    assert json.loads(files[0].read_text())["longest"] == room
    assert files[1].stat().st_size > 1000


@pytest.mark.parametrize(("ours", "status"), [(0.9, 0), (1.1, 1)])
def test_speed_is_judged_by_rounds(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ours: float, status: int
) -> None:
    pytest.importorskip("matplotlib")
    speed, result = scripts["speed"], scripts["trials"].Result
    clock = iter(range(1, 100))

    def measured(way: str, *_: Any) -> Any:
        # Every round the machine is slower: only ratios within a round mean anything.
        slow = (next(clock) - 1) // 2 + 1
        return result(True, 0, slow * (ours if way == speed.OURS else 1.0), 0.0)

    monkeypatch.setattr(speed, "measure", measured)
    picture = tmp_path / "speed.svg"
    said = CliRunner().invoke(
        speed.main, ["--way", speed.BASE, "--way", speed.OURS, "--plot", str(picture)]
    )
    assert said.exit_code == status, said.output
    assert f"{ours:.2f}" in said.output
    assert picture.stat().st_size > 1000


def test_a_step_in_a_fresh_process(scripts: Any) -> None:
    trials = scripts["trials"]
    subject = trials.Subject(hidden=32, layers=1, heads=2, vocabulary=4000, chunk=64)
    found = trials.measure("plain", 1024, subject)
    assert found.fits
    assert found.seconds > 0
    # Logits, their logarithms and gradients are in memory together.
    assert found.growth > 2 * 1024 * 4000 * 4
    assert 7 < found.loss < 10


@pytest.mark.nightly
def test_a_step_over_budget_is_ended(scripts: Any) -> None:
    trials = scripts["trials"]
    subject = trials.Subject(hidden=32, layers=1, heads=2, vocabulary=32000, chunk=64)
    found = trials.measure("plain", 4096, subject, budget=64 * 2**20)
    assert not found.fits
    assert found.growth > 64 * 2**20


@pytest.mark.nightly
@pytest.mark.parametrize(
    "arguments",
    [
        ("speed.py", "--tokens", "256", "--rounds", "1"),
        ("lengths.py", "--budget", "64MiB", "--first", "256", "--most", "256"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_scripts_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    script, *options = arguments
    file = tmp_path / "results.json"
    said = subprocess.run(
        [sys.executable, str(FOLDER / script), *options, *TINY, "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert said.returncode in (0, 1), said.stderr
    assert "chunks in files" in said.stdout
    assert json.loads(file.read_text())["subject"]["hidden"] == 32
