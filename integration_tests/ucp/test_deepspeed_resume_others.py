"""DeepSpeed goes on in another precision, from other frameworks, and there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from ucp.deepspeed_changes import SOURCES, Change, convert, require_state, write
from ucp.deepspeed_models import build as build_model
from ucp.deepspeed_runs import Lab, Saved

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources.dcp import open_view as open_dcp
from core_ucp.sources.deepspeed import open_view
from core_ucp.sources.universal import open_view as open_universal
from core_ucp.targets import universal
from core_ucp.targets.deepspeed import DeepSpeedOptions
from core_ucp.targets.universal import UniversalOptions

pytest.importorskip("deepspeed")

PRECISIONS = (
    Change("zero1-dp4-fp16", 1, 2, precision="bf16"),
    Change("zero1-dp2", 3, 2, precision="fp16"),
    Change("zero1-dp2", 0, 2, precision="fp32"),
    Change("stage0-fp32", 2, 2, precision="bf16"),
)


@pytest.mark.nightly
@pytest.mark.parametrize("change", PRECISIONS, ids=str)
def test_a_run_goes_on_in_another_precision(change: Change, lab: Lab, tmp_path: Path) -> None:
    saved = lab.saved(SOURCES[change.source])
    folder = convert(saved, change.options, tmp_path / "made")
    resumed = lab.resume(change.case, folder)
    require_state(saved, resumed, halves=False)
    assert resumed.losses == pytest.approx(saved.facts["continued"], rel=1e-2)


def test_what_deepspeed_saves_after_that_is_read_again(lab: Lab, tmp_path: Path) -> None:
    change = Change("zero1-dp4", 3, 2)
    saved = lab.saved(SOURCES[change.source])
    folder = convert(saved, change.options, tmp_path / "made")
    middle = lab.resume(change.case, folder, steps=1, save=True)
    back = Saved(change.case, middle.path)
    again = Change("zero1-dp4", 1, 4)
    resumed = lab.resume(again.case, convert(back, again.options, tmp_path / "back"), steps=2)
    losses = [*middle.losses, *resumed.losses]
    assert losses == pytest.approx(saved.facts["continued"], rel=1e-3)


def test_a_run_goes_on_from_the_universal_form(lab: Lab, tmp_path: Path) -> None:
    """Groups, their order, and what is frozen survive where files are sorted otherwise."""
    saved = lab.saved(SOURCES["zero2-round-robin"])
    view = open_view(saved.folder)
    (tmp_path / "universal").mkdir()
    execute(plan(view, universal.build(view, UniversalOptions())), tmp_path / "universal")
    change = Change("zero2-round-robin", 1, 2)
    made = write(open_universal(tmp_path / "universal"), change.options, tmp_path / "made")
    resumed = lab.resume(change.case, made)
    require_state(saved, resumed, halves=True)
    assert resumed.losses == pytest.approx(saved.facts["continued"], rel=1e-3)


def save_with_torch(saved: Saved, folder: Path) -> None:
    """What a run of torch alone would have saved with DCP at the same step."""
    truth, facts = saved.truth(), saved.facts
    model = build_model(saved.case)
    model.load_state_dict(
        {key[5:]: tensor for key, tensor in truth.items() if key.startswith("half.")}
    )
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [weights[name] for name in names], **hyper}
            for names, hyper in zip(facts["groups"], facts["hyper"], strict=True)
        ]
    )
    for name, weight in weights.items():
        optimizer.state[weight] = {
            state: truth[f"optim.state.{name}.{state}"]
            for state in ("step", "exp_avg", "exp_avg_sq")
        }
    states = get_state_dict(model, optimizer)
    values = {"lr_scheduler": facts["scheduler"], "tokens_seen": facts["global_steps"] * 12}
    dcp.save({"model": states[0], "optim": states[1], **values}, checkpoint_id=folder)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_of_torch_goes_on_in_deepspeed(lab: Lab, tmp_path: Path, stage: int) -> None:
    change = Change("stage0-fp32", stage, 2)
    saved = lab.saved(SOURCES[change.source])
    save_with_torch(saved, tmp_path / "dcp")
    options = dataclasses.replace(change.options, buffers=("offset",))
    made = write(open_dcp(tmp_path / "dcp"), options, tmp_path / "made")
    resumed = lab.resume(change.case, made)
    require_state(saved, resumed, halves=True)
    assert resumed.facts["steps_loaded"] == saved.facts["global_steps"]
    assert resumed.losses == pytest.approx(saved.facts["continued"], rel=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3])
def test_the_optimizer_that_sums_gradients_in_full_precision_takes_the_files(
    lab: Lab, tmp_path: Path, world: int
) -> None:
    """Stage 1 of bf16 has two optimizers, and DeepSpeed chooses by this setting."""
    change = Change("zero1-dp2", 1, world)
    saved = lab.saved(SOURCES[change.source])
    case = change.case.but("sums", settings={"data_types": {"grad_accum_dtype": "fp32"}})
    resumed = lab.resume(case, convert(saved, change.options, tmp_path / "made"))
    require_state(saved, resumed, halves=True)
    assert resumed.losses == pytest.approx(saved.facts["continued"], rel=1e-3)


@pytest.mark.nightly
def test_an_empty_weight_is_named_where_the_optimizer_is_that_of_torch(
    lab: Lab, tmp_path: Path
) -> None:
    """ZeRO leaves it out of its groups, so that its files do not say which one it is in."""
    change = Change("zero1-fp32", 0, 2)
    saved = lab.saved(SOURCES[change.source])
    (names,) = saved.facts["groups"]
    place = names.index("temperature") + 1
    groups = ((*names[:place], "unused", *names[place:]),)
    options = DeepSpeedOptions(stage=0, world_size=2, dtype="fp32", groups=groups)
    resumed = lab.resume(change.case, convert(saved, options, tmp_path / "made"))
    require_state(saved, resumed, halves=True)
    assert resumed.losses == pytest.approx(saved.facts["continued"], rel=1e-3)
