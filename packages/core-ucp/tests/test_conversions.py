"""``core convert`` to every kind of target: bit for bit, said as JSON, and refused in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Core = Callable[..., Any]
TARGETS = ["universal", "huggingface", "deepspeed", "megatron", "torch-dcp", "dcp", "safetensors"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("form", ["full", "dcp", "universal"])
def test_every_target_holds_what_the_source_holds(
    core: Core, saved: Any, tmp_path: Path, form: str, to: str
) -> None:
    source, target = getattr(saved, form), tmp_path / "deep" / "out"
    said = core("convert", source, target, "--to", to)
    assert said.code == 0, said
    assert said.out.startswith(f"wrote {target}: ")
    found = core("ucp", "diff", source, target, "--json").json
    missing = [each for each in found["differences"] if each["problem"] == f"only in {source}"]
    assert missing == found["differences"]
    expected = {key for key in saved.truth if "optim." in key} if to == "huggingface" else set()
    assert {each["key"] for each in missing} == expected
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_dry_run_says_the_same_and_writes_nothing(
    core: Core, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = core("convert", saved.full, "out", "--to", to, "--dry-run", "--json").json
    assert not list(tmp_path.iterdir())
    done = core("convert", saved.full, "out", "--to", to, "--json").json
    assert (dry.pop("done"), done.pop("done")) == (False, True)
    assert done == {key: dry[key] for key in done}
    assert dry["bytes"] >= sum(t.nbytes for k, t in saved.truth.items() if "optim" not in k)
    extra = {"framework", "mesh", "files", "copies", "estimated seconds"}
    assert to in ("dcp", "safetensors") or extra <= dry.keys()


def test_a_dry_run_prints_its_plan(core: Core, saved: Any, tmp_path: Path) -> None:
    said = core("convert", saved.full, tmp_path / "out", "--to", "huggingface", "--dry-run")
    first, *rest = said.out.splitlines()
    assert first.startswith(f"would write {tmp_path / 'out'}: 4 tensors, 848 bytes")
    assert "  framework: torch" in rest
    assert "  mesh: -" in rest
    assert any(line.startswith("  estimated seconds: ") for line in rest)
    assert "  note: there is no config.json: from_pretrained needs one beside the weights" in rest


def test_what_is_left_out_is_listed(core: Core, saved: Any, tmp_path: Path) -> None:
    found = core("convert", saved.full, tmp_path / "out", "--to", "huggingface", "--json").json
    assert found["skipped"] == sorted(key for key in saved.truth if "optim." in key)
    assert any("12 tensors" in remark for remark in found["remarks"])


# Refused before anything is written


def refused(core: Core, folder: Path, *words: object) -> str:
    """The error of a conversion, which has changed nothing in a folder."""
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))
    error: str = core("convert", *words).error
    assert before == sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*"))
    assert core("convert", *words, "--json").error == error
    return error


def test_paths_that_cannot_be_used(core: Core, saved: Any, tmp_path: Path) -> None:
    source, to = tmp_path / "in", ("--to", "universal")
    shutil.copytree(saved.dcp, source)
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()

    def error(*words: object) -> str:
        return refused(core, tmp_path, *words, *to)

    assert "absent does not exist" in error(tmp_path / "absent", tmp_path / "out")
    assert "taken exists already" in error(source, tmp_path / "taken")
    assert "link exists already" in error(source, tmp_path / "link")
    assert "are the same" in error(source, source)
    assert "lies inside of" in error(source, source / "deep" / "out")
    assert "lies inside of" in error(source, tmp_path)
    assert "Not a directory" in error(source, tmp_path / "file" / "out")


def test_formats_that_cannot_be_used(core: Core, saved: Any, tmp_path: Path) -> None:
    def error(*words: object) -> str:
        return refused(core, tmp_path, saved.full, tmp_path / "out", *words)

    assert "did you mean 'universal'?" in error("--to", "universl")
    assert "'torch-save' cannot be used: it cannot be written" in error("--to", "torch-save")
    named = "--to", "universal", "--from"
    assert "did you mean 'huggingface'?" in error(*named, "huggingfac")
    assert "'huggingface' cannot be used: it cannot be read" in error(*named, "huggingface")
    assert "full.pt" in error(*named, "deepspeed")


@pytest.mark.parametrize("to", TARGETS)
def test_a_flipped_bit_is_found_on_the_way(core: Core, saved: Any, tmp_path: Path, to: str) -> None:
    source = tmp_path / "in"
    shutil.copytree(saved.universal, source)
    (file,) = source.glob("model*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error = refused(core, tmp_path, source, tmp_path / "out", "--to", to)
    assert "is not what was saved" in error
    assert "use another copy of the checkpoint" in error
