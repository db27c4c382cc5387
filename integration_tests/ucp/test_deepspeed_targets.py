"""What DeepSpeed and its tools make of files that were made for it, and what they refuse."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from ucp.deepspeed_cases import CASES, Case
from ucp.deepspeed_changes import convert
from ucp.deepspeed_runs import Lab, RunError

from core_ucp.targets.deepspeed import DeepSpeedOptions

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("stage", [1, 3])
def test_files_have_the_names_and_keys_of_deepspeed(lab: Lab, tmp_path: Path, stage: Any) -> None:
    """Except for the limit of clipping, which is the run's own."""
    name = {1: "zero1-dp2", 3: "zero3-dp2"}[stage]
    saved = lab.saved(CASES[name])
    options = DeepSpeedOptions(stage=stage, world_size=2, sub_group_size=3000)
    convert(saved, options, tmp_path / "made")
    made = tmp_path / "made" / (tmp_path / "made" / "latest").read_text()
    assert made.name == saved.tag_folder.name
    real = {path.name for path in saved.tag_folder.glob("*.pt")}
    assert {path.name for path in made.iterdir()} == real
    for file in sorted(real):
        ours, theirs = (
            _outline(torch.load(folder / file, weights_only=False))
            for folder in (made, saved.tag_folder)
        )
        more = {key for key, value in ours.items() if theirs.get(key) != value}
        assert {key.rpartition(".")[2] for key in more} <= {"bias_correction"}, file
        assert theirs.keys() - ours.keys() <= {"optimizer_state_dict.clip_grad"}, file
        with zipfile.ZipFile(made / file) as archive:
            assert archive.testzip() is None


def _outline(value: Any, name: str = "") -> dict[str, Any]:
    """Kinds, shapes and plain values by place."""
    inner = f"{name}." if name else ""
    if name == "ds_config":
        return {}
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape))}
    if isinstance(value, torch.Size) or not isinstance(value, dict | list | tuple):
        return {name: _plain(value)}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {f"{name}:": type(value).__name__}
    for key, item in items:
        found |= _outline(item, f"{inner}{key}")
    return found


def _plain(value: Any) -> Any:
    return {**vars(value), "kind": type(value).__name__} if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_tool_finds_the_same_weights(lab: Lab, tmp_path: Path, stage: Any) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    saved = lab.saved(CASES["zero3-frozen"] if stage > 1 else CASES["zero1-dp2"])
    convert(saved, DeepSpeedOptions(stage=stage, world_size=5), tmp_path / "made")
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "made"))
    truth = saved.truth()
    for key, tensor in truth.items():
        if key.startswith("model."):
            assert torch.equal(found[key.removeprefix("model.")], tensor), key
    frozen = [key for key in truth if key.startswith("half.") and f"model.{key[5:]}" not in truth]
    assert frozen
    for key in frozen:
        assert torch.equal(found[key.removeprefix("half.")].to(truth[key].dtype), truth[key]), key


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_own_converter_takes_the_files(lab: Lab, tmp_path: Path, stage: Any) -> None:
    """It goes by ``param_slice_mappings``, which loading does not."""
    from deepspeed.checkpoint import ds_to_universal

    saved = lab.saved(CASES["zero2-round-robin"])
    options = DeepSpeedOptions(stage=stage, world_size=2, round_robin=stage == 2)
    folder = convert(saved, options, tmp_path / "made")
    universal = tmp_path / "universal"
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / (folder / "latest").read_text()),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    truth = saved.truth()
    names = [key.removeprefix("model.") for key in truth if key.startswith("model.")]
    for name in names:
        for state, key in (("fp32", f"model.{name}"), ("exp_avg", f"optim.state.{name}.exp_avg")):
            found = torch.load(universal / "zero" / name / f"{state}.pt", weights_only=False)
            assert torch.equal(found["param"].view_as(truth[key]), truth[key]), key


@pytest.mark.parametrize(
    ("case", "options", "problem"),
    [
        (Case("other-world", world=3, groups=2), {"world_size": 2}, "DP world size"),
        (Case("other-groups", world=2), {"world_size": 2}, "parameter-alignment layout"),
        (
            Case("other-padding", world=2, groups=2, zero={"parameter_alignment": True}),
            {"world_size": 2},
            "parameter-alignment layout",
        ),
    ],
    ids=["world", "groups", "alignment"],
)
def test_deepspeed_refuses_files_that_were_made_for_another_run(
    lab: Lab, tmp_path: Path, case: Case, options: dict[str, Any], problem: str
) -> None:
    saved = lab.saved(CASES["zero1-dp2"])
    convert(saved, DeepSpeedOptions(**options), tmp_path / "made")
    with pytest.raises(RunError, match=problem):
        lab.resume(case, tmp_path / "made")
