"""``core ucp inspect``, ``verify`` and ``diff``: exit status, tables, JSON, and clear errors."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Core = Callable[..., Any]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(name="damaged")
def _damaged(saved: Any, tmp_path: Path) -> Path:
    """A universal folder with one flipped bit in its last tensor."""
    shutil.copytree(saved.universal, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("model*.safetensors")
    flip(file, -1)
    return tmp_path / "damaged"


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path("pwned").write_text, ("x",)


# inspect


def test_inspect_shows_what_is_there(core: Core, saved: Any) -> None:
    said = core("ucp", "inspect", saved.full)
    assert said.code == 0
    assert "framework: torch\n" in said.out
    assert "parameters: 212\n" in said.out
    rows = [line.split() for line in said.out.splitlines() if " model." in line]
    assert ["float32", "[16,", "8]", "1", "model.0.weight"] in rows
    assert "HOLE" not in said.out


@pytest.mark.parametrize("form", ["full", "dcp", "universal"])
def test_inspect_as_json_is_the_truth(core: Core, saved: Any, form: str) -> None:
    found = core("ucp", "inspect", getattr(saved, form), "--json").json
    tensors = {row["key"]: (row["dtype"], tuple(row["shape"])) for row in found["tensors"]}
    assert tensors == {
        key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in saved.truth.items()
    }
    assert (found["step"], found["weights"], found["parameters"]) == (1, 4, 212)
    assert found["holes"] == []


def test_inspect_shows_the_first_and_counts_the_rest(core: Core, tmp_path: Path) -> None:
    torch.save({f"w{i:02}": torch.zeros(1) for i in range(50)}, tmp_path / "many.pt")
    some = core("ucp", "inspect", tmp_path / "many.pt").out
    assert "... and 10 more; --all shows them" in some
    assert "w39" in some
    assert "w40" not in some
    assert "w49" in core("ucp", "inspect", tmp_path / "many.pt", "--all").out


# verify


def test_verify_says_what_it_has_held_against_what(core: Core, saved: Any) -> None:
    said = core("ucp", "verify", saved.universal)
    assert (said.code, said.out.split(",")[0]) == (0, "16 tensors are what was saved")
    said = core("ucp", "verify", saved.full)
    assert said.code == 0
    assert "16 could be read but have nothing to be held against" in said.out


def test_verify_names_the_damaged_tensor(core: Core, damaged: Path) -> None:
    said = core("ucp", "verify", damaged)
    assert said.code == 1
    (bad,) = (line for line in said.out.splitlines() if line.startswith("BAD"))
    found = core("ucp", "verify", damaged, "--json")
    assert found.code == 1
    assert found.json["sound"] is False
    assert found.json["counts"] == {"ok": 15, "unchecked": 0, "bad": 1}
    (problem,) = found.json["problems"]
    assert problem["key"] in bad
    assert "is not what was saved" in problem["problem"]


def test_verify_as_json_of_a_sound_one(core: Core, saved: Any) -> None:
    found = core("ucp", "verify", saved.universal, "--json")
    assert found.code == 0
    assert found.json["sound"] is True
    assert found.json["counts"] == {"ok": 16, "unchecked": 0, "bad": 0}


# diff


@pytest.mark.parametrize("left", ["full", "dcp", "universal"])
@pytest.mark.parametrize("right", ["full", "universal"])
def test_one_state_is_the_same_in_every_format(
    core: Core, saved: Any, left: str, right: str
) -> None:
    said = core("ucp", "diff", getattr(saved, left), getattr(saved, right))
    assert (said.code, said.out) == (0, "16 and 16 tensors: the same, bit for bit\n")


def test_diff_tells_what_differs(core: Core, saved: Any, damaged: Path) -> None:
    said = core("ucp", "diff", saved.dcp, damaged)
    assert said.code == 1
    first, last = said.out.splitlines()
    assert ": 1 of " in first
    assert last == "16 and 16 tensors: 1 difference"
    found = core("ucp", "diff", saved.dcp, damaged, "--json")
    assert found.code == 1
    assert found.json["same"] is False
    (difference,) = found.json["differences"]
    assert first == f"{difference['key']}: {difference['problem']}"


def test_diff_names_what_only_one_has(core: Core, saved: Any, tmp_path: Path) -> None:
    torch.save({"new": torch.zeros(2)}, tmp_path / "other.pt")
    found = core("ucp", "diff", saved.full, tmp_path / "other.pt", "--json").json
    assert len(found["differences"]) == 17
    assert {"key": "model.new", "problem": f"only in {tmp_path / 'other.pt'}"} in found[
        "differences"
    ]


def test_each_side_of_a_diff_has_kind_and_rules_of_its_own(
    core: Core, saved: Any, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[lens]]\nkind = 'rename'\nmatch = '{n**}'\nto = 'renamed.{n}'\n")
    target = tmp_path / "renamed"
    assert core("convert", saved.full, target, "--to", "universal", "--rules", rules).code == 0
    assert core("ucp", "diff", saved.full, target).code == 1
    assert core("ucp", "diff", saved.full, target, "--rules", rules).code == 0
    assert core("ucp", "diff", target, saved.full, "--right-rules", rules).code == 0
    wrong = core("ucp", "diff", target, saved.full, "--right-from", "dcp")
    assert wrong.error


# What no command can open


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
def test_what_cannot_be_opened_is_one_clear_error(
    core: Core, saved: Any, tmp_path: Path, command: str
) -> None:
    more = [saved.full] if command == "diff" else []

    def error(path: Path, *words: object) -> str:
        found: str = core("ucp", command, path, *more, *words).error
        assert core("ucp", command, path, *more, *words, "--json").error == found
        return found

    assert "absent does not exist" in error(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty is of no known kind" in error(tmp_path / "empty")
    unknown = error(saved.full, "--from", "universl")
    assert "no kind of checkpoint is called 'universl'" in unknown
    assert "did you mean 'universal'?" in unknown
    assert "there are no rules 'llama'" in error(saved.full, "--rules", "llama")


def test_an_ambiguous_folder_is_named_with_its_kinds(
    core: Core, saved: Any, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(saved.dcp, both)
    shutil.copytree(saved.universal, both, dirs_exist_ok=True)
    said = core("ucp", "inspect", both).error
    assert "both looks like universal, torch-dcp" in said
    assert "--from" in said
    for kind in ("universal", "dcp"):
        found = core("ucp", "inspect", both, "--from", kind, "--json").json
        assert found["framework"] == kind
    assert "looks like" in core("convert", both, tmp_path / "out", "--to", "universal").error


def test_damage_is_told_without_a_traceback(core: Core, saved: Any, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(saved.full.read_bytes()[:3000])
    assert "truncated.pt is damaged" in core("ucp", "verify", truncated).error
    folder = tmp_path / "manifest"
    shutil.copytree(saved.universal, folder)
    flip(folder / "ucp.json", 700)
    assert "ucp.json is damaged" in core("ucp", "verify", folder).error
    folder = tmp_path / "short"
    shutil.copytree(saved.dcp, folder)
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-3000])
    said = core("ucp", "inspect", folder).error
    assert f"{data} is truncated" in said


def test_a_pickle_that_wants_to_run_code_runs_nothing(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Hostile()}, "hostile.pt")
    Path("bare.pt").write_bytes(pickle.dumps({"w": Hostile()}))
    Path("dcp").mkdir()
    Path("dcp/.metadata").write_bytes(pickle.dumps(Hostile()))
    assert (
        "blocked global builtins.getattr in hostile.pt"
        in core("ucp", "inspect", "hostile.pt").error
    )
    assert "no known kind" in core("ucp", "inspect", "bare.pt").error
    assert "wants to run builtins.getattr" in core("ucp", "inspect", "dcp").error
    for path in ("hostile.pt", "bare.pt", "dcp"):
        assert core("convert", path, "out", "--to", "universal").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pt", "dcp", "hostile.pt"]
