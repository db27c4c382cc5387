"""The public names: there on first use, free until then, and the same as the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import core_ucp
from core.errors import CheckpointError, PluginError, SettingsError
from core_ucp import UniversalReader, convert, diff, load_rules, open_checkpoint, verify


def test_every_public_name_is_there() -> None:
    assert {name: getattr(core_ucp, name).__name__ for name in core_ucp.__all__} == {
        name: name for name in core_ucp.__all__
    }
    assert set(core_ucp.__all__) <= set(dir(core_ucp))
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        core_ucp.__getattr__("convrt")


def test_importing_it_loads_nothing() -> None:
    code = (
        "import sys, core_ucp; print([m for m in ('torch', 'numpy', 'core') if m in sys.modules])"
    )
    call = [sys.executable, "-c", code]
    assert subprocess.run(call, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_convert_is_the_command(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = convert(saved.full, "out", to="deepspeed", stage=3, world_size=2)
    assert done.remarks
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = open_checkpoint("out")
    assert made.mesh["dp"] == 2
    assert not list(diff(open_checkpoint(saved.full), made))
    assert {found.status for found in verify(open_checkpoint(saved.universal))} == {"ok"}


def test_convert_takes_paths_kinds_and_rules(saved: Any, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[lens]]\nkind = 'rename'\nmatch = '{n**}'\nto = 'mine.{n}'\n")
    target = os.fspath(tmp_path / "out")
    convert(os.fspath(saved.dcp), target, to="universal", kind="torch-dcp", rules=rules)
    seen = open_checkpoint(saved.dcp, rules=load_rules(rules))
    assert seen.atoms.keys() == open_checkpoint(target).atoms.keys()
    assert "model.mine.0.weight" in seen.atoms


def test_what_convert_refuses(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ucp\.stage = 7"):
        convert(saved.full, tmp_path / "out", to="deepspeed", stage=7)
    with pytest.raises(PluginError, match="did you mean 'universal'"):
        convert(saved.full, tmp_path / "out", to="universl")
    with pytest.raises(CheckpointError, match="absent does not exist"):
        convert(tmp_path / "absent", tmp_path / "out", to="universal")
    assert not list(tmp_path.iterdir())


def test_the_reader_of_the_readme(saved: Any) -> None:
    key = "model.0.weight"
    state = {key: torch.zeros_like(saved.truth[key])}
    dcp.load(state, storage_reader=UniversalReader(saved.full), no_dist=True)
    assert torch.equal(state[key], saved.truth[key])
