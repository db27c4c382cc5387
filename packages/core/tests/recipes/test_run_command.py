"""``core run``: one folder, one run; nothing of the user's is lost, nothing is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.cli import cli
from core.errors import CoreError

TINY = ("model=small:tiny", "steps=2", "save_every=1", "text_limit=60000", "vocabulary=300")
SMALL = [f"--set=train.{value}" for value in (*TINY, "sequence_length=32", "evaluate_sequences=4")]


def call(*args: Any) -> Result:
    return CliRunner().invoke(cli, ["run", "train", *map(str, args)])


def refused(*args: Any) -> str:
    result = call(*args)
    assert isinstance(result.exception, CoreError), result.output
    return str(result.exception)


def test_resume_remembers_the_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("--out", out, *SMALL).exit_code == 0
    before = json.loads((out / "settings.json").read_text())
    assert call("--out", out, "--resume", "--set", "train.steps=3").exit_code == 0
    after = json.loads((out / "settings.json").read_text())
    assert after["train"] == {**before["train"], "steps": 3}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_resume_that_is_not_possible_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("--out", out, *SMALL).exit_code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    reason = refused("--out", out, "--resume", "--set", "train.config={hidden_size=32}")
    assert "cannot load" in reason
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_overwrite_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "project"
    (out / "notes").mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    assert call("--out", out, *SMALL).exit_code == 0
    assert "--overwrite" in refused("--out", out, *SMALL)
    assert call("--out", out, "--overwrite", *SMALL).exit_code == 0
    assert (out / "thesis.txt").read_text() == "years of work"
    assert (out / "notes").is_dir()
    assert call("--out", out, "--overwrite", "--resume", *SMALL).exit_code == 2


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot create" in refused("--out", tmp_path / "file" / "run", *SMALL)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("checkpoint.format=nonsense", "dcp"),
        ("checkpoint.storage=nonsense", "files"),
        ("engine.name=nonsense", "plain"),
    ],
)
def test_names_that_nobody_offers_stop_before_anything(
    tmp_path: Path, setting: str, known: str
) -> None:
    reason = refused("--out", tmp_path / "run", "--set", setting, *SMALL)
    assert "nonsense" in reason
    assert known in reason
    assert not (tmp_path / "run").exists()


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    result = call("--out", tmp_path / "run", "--json", *SMALL)
    assert json.loads(result.stdout)["steps"] == 2
