"""Wrong settings are refused by name before anything happens; right ones reach what they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Core = Callable[..., Any]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ucp.stage=7", "ucp.stage = 7: Input should be 0, 1, 2 or 3"),
        ("ucp.stge=1", "unknown key; did you mean 'stage'?"),
        ("ucp.world_size=0", "greater than or equal to 1"),
        ("ucp.dtype=fp8", "'source', 'float32', 'bfloat16' or 'float16'"),
        ("ucp.shard_size=0", "greater than or equal to 0.001"),
        ("ucp.workers=65", "less than or equal to 64"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    core: Core, saved: Any, tmp_path: Path, assignment: str, message: str
) -> None:
    said = core("convert", saved.full, tmp_path / "out", "--to", "deepspeed", "--set", assignment)
    assert message in said.error
    assert assignment.partition("=")[0] in said.error
    assert not list(tmp_path.iterdir())


def made(core: Core, source: Path, target: Path, to: str, *assignments: str) -> Path:
    words = [word for assignment in assignments for word in ("--set", assignment)]
    assert core("convert", source, target, "--to", to, *words).code == 0
    return target


def test_stage_and_world_size_of_a_deepspeed_target(core: Core, saved: Any, tmp_path: Path) -> None:
    settings = "ucp.stage=3", "ucp.world_size=3"
    target = made(core, saved.full, tmp_path / "out", "deepspeed", *settings)
    found = core("ucp", "inspect", target, "--json").json
    assert found["mesh"]["dp"] == 3
    assert [found[key] for key in found if "stage" in key] == [3]
    assert core("ucp", "diff", saved.full, target).code == 0


def test_dtype_of_a_huggingface_target(core: Core, saved: Any, tmp_path: Path) -> None:
    target = made(core, saved.full, tmp_path / "out", "huggingface", "ucp.dtype=bfloat16")
    found = core("ucp", "inspect", target, "--json").json
    assert {row["dtype"] for row in found["tensors"]} == {"bfloat16"}
    assert {row["key"] for row in found["tensors"]} == {k for k in saved.truth if "optim" not in k}


def test_the_configuration_that_is_named_goes_along(core: Core, saved: Any, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_type": "mine"}))
    named = f"ucp.config={tmp_path / 'config'}"
    target = made(core, saved.full, tmp_path / "out", "huggingface", named)
    assert json.loads((target / "config.json").read_text())["model_type"] == "mine"
    missing = f"ucp.config={tmp_path / 'absent'}"
    words = ("--to", "huggingface", "--set", missing)
    said = core("convert", saved.full, tmp_path / "other", *words)
    assert "absent has no config.json" in said.error


def test_one_worker_and_many_make_the_same(core: Core, saved: Any, tmp_path: Path) -> None:
    one, many = (
        made(core, saved.full, tmp_path / count, "universal", f"ucp.workers={count}")
        for count in ("1", "8")
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in many.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (many / name).read_bytes()
