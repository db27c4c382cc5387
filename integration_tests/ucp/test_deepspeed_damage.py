"""Incomplete, mixed, damaged and hostile DeepSpeed folders are one clear error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ucp.deepspeed_cases import CASES
from ucp.deepspeed_runs import Lab, copy
from ucp.reading import snapshot

from core.errors import CheckpointError
from core_ucp.sources.deepspeed import detect, open_view


@pytest.fixture
def copied(lab: Lab, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of what a case has saved; returns the folder of its tag."""

    def make(name: str) -> Path:
        saved = lab.saved(CASES[name])
        return copy(saved.folder, tmp_path / name) / saved.tag_folder.name

    return make


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change what a file of torch.save holds."""
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize(
    ("name", "file", "missing"),
    [
        ("zero1-dp2", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "1 of 2 files are missing"),
        ("zero3-dp2", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "1 of 2 files are missing"),
        ("zero3-dp2", "zero_pp_rank_1_mp_rank_00_model_states.pt", "1 of 2 files are missing"),
        ("zero1-autotp", "mp_rank_01_model_states.pt", "1 of 2 files are missing"),
        ("pipeline", "layer_03-model_states.pt", "the file of layer 3 is missing"),
        ("pipeline", "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "files are missing"),
        ("moe", "layer_1_expert_2_mp_rank_00_model_states.pt", "expert 2 of layer 1 is missing"),
        ("zero1-dp2", "mp_rank_00_model_states.pt", "it has no files of model states"),
    ],
)
def test_missing_files(name: str, file: str, missing: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=missing) as caught:
        open_view(folder.parent)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["zero1-dp2", "zero3-dp2", "stage0-fp32", "moe", "pipeline"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files(name: str, part: float, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    for path in sorted(folder.glob("*.pt")):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CheckpointError, match=path.name):
            open_view(folder)
        path.write_bytes(content)


def test_flipped_bytes_in_pickles(copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    path = folder / "mp_rank_00_model_states.pt"
    content = path.read_bytes()
    begin = content.index(b"param_shapes")
    for at in range(begin - 300, begin + 300, 7):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is damaged"):
            open_view(folder)


def test_files_of_two_steps(lab: Lab, copied: Callable[[str], Path]) -> None:
    first = copied("zero1-dp2")
    later = lab.saved(CASES["zero1-dp2"].but("zero1-later", steps=5, more=0)).tag_folder
    optimizer = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(later / optimizer, first / optimizer)
    with pytest.raises(CheckpointError, match="mixes files of several steps") as caught:
        open_view(first)
    assert optimizer in str(caught.value)
    shutil.copy(later / optimizer.replace("rank_1", "rank_0"), first)
    with pytest.raises(CheckpointError, match="files of two checkpoints are mixed"):
        open_view(first)


def test_model_files_of_two_steps(copied: Callable[[str], Path]) -> None:
    folder = copied("zero3-dp2")
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    rewrite(path, lambda tree: tree.update(global_steps=7))
    with pytest.raises(CheckpointError, match="mixes files of several checkpoints") as caught:
        open_view(folder)
    assert "model_states.pt has 7" in str(caught.value)


def test_files_of_a_larger_old_world_are_left_alone(
    lab: Lab, copied: Callable[[str], Path]
) -> None:
    folder = copied("zero1-dp2")
    expected = snapshot(open_view(folder))
    for rank in (2, 3):
        source = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
        shutil.copy(source, folder / source.name.replace("rank_0", f"rank_{rank}", 1))
    other = lab.saved(CASES["zero1-dp4-fp16"]).tag_folder
    for path in other.glob("zero_pp_rank_*"):
        shutil.copy(path, folder)
    view = open_view(folder)
    assert snapshot(view) == expected
    assert any("6 files are left from an older run" in remark for remark in view.remarks)


def test_a_new_stage_over_an_old_one(lab: Lab, copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    newer = lab.saved(CASES["zero3-dp2"]).tag_folder
    for path in newer.glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    view = open_view(folder)
    assert snapshot(view) == snapshot(open_view(newer))
    assert any("mp_rank_00_model_states.pt" in remark for remark in view.remarks)


def test_the_tag_of_latest(copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    latest = folder.parent / "latest"
    latest.write_text("global_step9")
    with pytest.raises(CheckpointError, match="names 'global_step9', which is no folder") as caught:
        open_view(folder.parent)
    assert "global_step3" in caught.value.fix
    assert not detect(folder.parent)
    latest.write_text("../../etc")
    with pytest.raises(CheckpointError, match="which is no folder beside it"):
        open_view(folder.parent)
    latest.unlink()
    assert open_view(folder.parent).details["tag"] == "global_step3"
    shutil.copytree(folder, folder.with_name("global_step4"))
    with pytest.raises(CheckpointError, match="holds 2 tags and no 'latest'"):
        open_view(folder.parent)
    assert open_view(folder.with_name("global_step4")).details["tag"] == "global_step4"


class Hostile:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("pattern", ["mp_rank_*", "*_optim_states.pt"])
def test_hostile_files(pattern: str, copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    marker = folder / "ran"
    path = next(folder.glob(pattern))
    rewrite(path, lambda tree: tree.update(more=Hostile(f"touch {marker}")))
    with pytest.raises(CheckpointError, match=r"blocked global posix\.system in") as caught:
        open_view(folder)
    assert path.name in str(caught.value)
    assert not marker.exists()


def test_a_source_that_changes_is_noticed(copied: Callable[[str], Path]) -> None:
    folder = copied("zero3-dp2")
    view = open_view(folder)
    view.files.require_unchanged()
    path = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        view.files.require_unchanged()


def test_the_source_may_be_read_only(copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o400)
    folder.chmod(0o500)
    try:
        open_view(folder).prove()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o700)


def test_weights_that_a_program_has_changed_are_remarked(copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-dp2")
    expected = snapshot(open_view(folder))
    path = folder / "mp_rank_00_model_states.pt"
    rewrite(path, lambda tree: tree["module"]["head.weight"].fill_(1))
    view = open_view(folder)
    assert any("the masters of 1 weights are not what computes" in text for text in view.remarks)
    assert snapshot(view) == expected


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
@pytest.mark.parametrize("where", ["state", "group"])
def test_steps_of_other_optimizers(step: Any, where: str, copied: Callable[[str], Path]) -> None:
    """Fused optimizers count in integers, some of them per group."""
    folder = copied("zero1-dp2")
    expected = snapshot(open_view(folder))

    def change(tree: Any) -> None:
        base = tree["optimizer_state_dict"]["base_optimizer_state"]
        for index, state in base["state"].items():
            del state["step"]
            owner = state if where == "state" else base["param_groups"][index]
            owner["step"] = step

    for path in folder.glob("*_optim_states.pt"):
        rewrite(path, change)
    view = open_view(folder)
    view.prove()
    assert view.resume.step == 3
    found = snapshot(view)
    if torch.is_tensor(step) and step.dtype == torch.int64:
        found = {k: v for k, v in found.items() if not k.endswith(".step")}
        expected = {k: v for k, v in expected.items() if not k.endswith(".step")}
    assert found == expected


def test_client_states_of_all_kinds(copied: Callable[[str], Path]) -> None:
    import argparse

    folder = copied("zero1-dp2")
    values = {
        "args": argparse.Namespace(lr=0.1, name="run", nested={"a": [1, (2, 3)]}),
        "seeds": torch.arange(5),
        "deep": {"tensor": torch.ones(2), "number": 4},
        "path": Path("x"),
    }
    rewrite(folder / "mp_rank_00_model_states.pt", lambda tree: tree.update(values))
    view = open_view(folder)
    client = view.resume.client
    assert client["args"] == {"lr": 0.1, "name": "run", "nested": {"a": [1, (2, 3)]}}
    assert client["deep"] == {"number": 4}
    assert "seeds" not in client
    assert view.atoms["extra.seeds"].shape == (5,)
    assert view.atoms["extra.deep.tensor"].shape == (2,)
    assert any("not read: path" in remark for remark in view.remarks)


def test_an_unknown_folder(tmp_path: Path) -> None:
    assert not detect(tmp_path)
    assert not detect(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no DeepSpeed checkpoint"):
        open_view(tmp_path)


def test_tensor_parallel_runs_that_do_not_say_how(copied: Callable[[str], Path]) -> None:
    folder = copied("zero1-autotp")
    for path in folder.glob("mp_rank_*"):
        rewrite(path, lambda tree: tree.update(universal_checkpoint_info=None))
    with pytest.raises(CheckpointError, match="2 tensor-parallel ranks, and does not say how"):
        open_view(folder)
