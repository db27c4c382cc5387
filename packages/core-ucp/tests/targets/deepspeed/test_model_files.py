"""The model's files: what computes, frozen weights, buffers, other names, and plain values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.targets.deepspeed import DeepSpeedOptions, build

Make = Callable[..., Any]
SHAPES = {"embed": (5, 3), "norm": (3,)}
HYPER = {name: {"lr": 0.1, "betas": (0.9, 0.99)} for name in SHAPES}


@pytest.fixture
def tensors(adam: Make) -> dict[str, torch.Tensor]:
    return adam(SHAPES) | {
        "model.frozen": torch.randn(7, 3),
        "model.empty": torch.zeros(0, 3),
        "model.scale": torch.randn(4),
        "model.count": torch.tensor(5),
    }


DETAILS = {"frozen": ["frozen", "empty"], "buffers": ["scale", "count"]}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_compute_in_half_precision_and_buffers_stay_as_they_are(
    tmp_path: Path, viewed: Make, written: Make, tensors: dict[str, torch.Tensor], stage: Any
) -> None:
    twin = tensors["model.embed"].half() + 1
    view = viewed(
        tmp_path / "s",
        tensors,
        twins={"model.embed": twin},
        aliases={"head": "embed"},
        details=DETAILS,
        hyper=HYPER,
    )
    options = DeepSpeedOptions(stage=stage, world_size=3, dtype="fp16")
    model = written(view, tmp_path / "t", options).model()
    module = model["module"]
    assert torch.equal(module["embed"], twin)
    assert module["head"].data_ptr() == module["embed"].data_ptr()
    assert torch.equal(module["norm"], tensors["model.norm"].half())
    assert torch.equal(module["frozen"], tensors["model.frozen"].half())
    assert torch.equal(module["scale"], tensors["model.scale"])
    assert torch.equal(module["count"], torch.tensor(5))
    assert model["buffer_names"] == ["scale", "count"]
    assert model["shared_params"] == ({"head": "embed"} if stage else None)
    if stage == 2:
        assert list(model["frozen_param_fragments"]) == ["frozen", "empty"]
        assert model["frozen_param_shapes"]["frozen"] == torch.Size([7, 3])
        assert torch.equal(model["frozen_param_fragments"]["frozen"], module["frozen"])
    else:
        assert model["frozen_param_fragments"] is None


def test_stage_3_cuts_frozen_weights_and_leaves_nothing_in_the_module(
    tmp_path: Path, viewed: Make, written: Make, tensors: dict[str, torch.Tensor]
) -> None:
    view = viewed(tmp_path / "s", tensors, aliases={"head": "embed"}, details=DETAILS, hyper=HYPER)
    made = written(view, tmp_path / "t", DeepSpeedOptions(stage=3, world_size=4))
    ranks = [made.model(rank) for rank in range(4)]
    parts = [rank["frozen_param_fragments"]["frozen"] for rank in ranks]
    assert [len(part) for part in parts] == [6, 6, 6, 6]
    whole = torch.cat(parts)
    assert torch.equal(whole[:21].view(7, 3), tensors["model.frozen"].bfloat16())
    assert not whole[21:].any()
    for rank in ranks:
        assert {name: tuple(t.shape) for name, t in rank["module"].items()} == {
            "embed": (0,), "norm": (0,), "frozen": (0,), "empty": (0,), "head": (0,),
            "scale": (4,), "count": (),
        }  # fmt: skip
        assert torch.equal(rank["module"]["scale"], tensors["model.scale"])
        assert torch.equal(rank["module"]["count"], torch.tensor(5))
        assert rank["frozen_param_shapes"]["empty"] == torch.Size([0, 3])
    assert any("frozen weights are rounded" in remark for remark in made.target.remarks)


def test_stage_3_asks_what_is_frozen_and_what_is_a_buffer(
    tmp_path: Path, viewed: Make, written: Make, tensors: dict[str, torch.Tensor]
) -> None:
    view = viewed(tmp_path / "s", tensors, hyper=HYPER)
    with pytest.raises(
        CheckpointError, match=r"frozen is a frozen weight or a buffer[\s\S]*options"
    ):
        build(view, DeepSpeedOptions(stage=3))
    options = DeepSpeedOptions(stage=3, frozen=("frozen", "empty"), buffers=("scale",))
    model = written(view, tmp_path / "t", options).model()
    assert list(model["frozen_param_shapes"]) == ["frozen", "empty"]
    assert model["buffer_names"] == ["scale", "count"]


def test_plain_values_are_where_deepspeed_looks_for_them(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(
        tmp_path / "s",
        adam(SHAPES),
        hyper=HYPER,
        step=7,
        scheduler={"last_batch_iteration": 6},
        counters={"global_steps": 8, "global_samples": 96, "skipped_steps": 1},
        client={"seen": {"tokens": 12, "names": ("a", "b")}, "ds_version": "0.1"},
    )
    made = written(view, tmp_path / "t", DeepSpeedOptions(world_size=2))
    assert made.folder.name == "global_step8"
    model = made.model()
    assert (model["global_steps"], model["global_samples"], model["skipped_steps"]) == (8, 96, 1)
    assert model["dp_world_size"] == 2
    assert model["lr_scheduler"] == {"last_batch_iteration": 6}
    assert model["seen"] == {"tokens": 12, "names": ("a", "b")}
    assert model["ds_version"] == "0.19.8"
    assert any("ds_version" in remark for remark in made.target.remarks)


def test_without_counters_the_steps_are_those_of_the_optimizer(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, step=7)
    made = written(view, tmp_path / "t", DeepSpeedOptions(tag="seventh"))
    assert made.folder.name == "seventh"
    model = made.model()
    assert model["global_steps"] == 7
    assert "global_samples" not in model
    assert model["lr_scheduler"] is None
    assert any("load_lr_scheduler_states=False" in remark for remark in made.target.remarks)


def test_values_of_users_that_no_file_can_hold_are_named(
    tmp_path: Path, viewed: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, client={"seen": {"ids": {1, 2}}})
    with pytest.raises(CheckpointError, match=r"seen\.ids is a set"):
        build(view, DeepSpeedOptions())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_without_optimizer_makes_a_model_file_only(
    tmp_path: Path, viewed: Make, written: Make, tensors: dict[str, torch.Tensor], stage: Any
) -> None:
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    made = written(viewed(tmp_path / "s", weights), tmp_path / "t", DeepSpeedOptions(stage=stage))
    assert [path.name for path in made.folder.iterdir()] == ["mp_rank_00_model_states.pt"]
    assert made.model()["optimizer"] is None
    assert any("load_optimizer_states=False" in remark for remark in made.target.remarks)


def test_tensors_without_a_place_are_remarked(tmp_path: Path, viewed: Make, adam: Make) -> None:
    tensors = adam(SHAPES) | {"extra.rng": torch.zeros(8)}
    target = build(viewed(tmp_path / "s", tensors, hyper=HYPER), DeepSpeedOptions())
    assert any("extra.rng" in remark for remark in target.remarks)


def test_schedules_follow_the_groups(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    hyper = {"embed": {"lr": 0.1, "betas": (0.9, 0.99)}, "norm": {"lr": 0.2, "betas": (0.9, 0.99)}}
    scheduler = {"base_lrs": [0.1, 0.2], "last_epoch": 3}
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=hyper, scheduler=scheduler)
    kept = written(view, tmp_path / "t", DeepSpeedOptions()).model()["lr_scheduler"]
    assert kept == scheduler
    options = DeepSpeedOptions(groups=(("norm",), ("embed",)))
    turned = written(view, tmp_path / "u", options).model()["lr_scheduler"]
    assert turned == {"base_lrs": [0.2, 0.1], "last_epoch": 3}
    options = DeepSpeedOptions(groups="one", hyper={"lr": 0.1})
    assert written(view, tmp_path / "v", options).model()["lr_scheduler"]["base_lrs"] == [0.1]
    odd = viewed(tmp_path / "o", adam(SHAPES), hyper=hyper, scheduler={"base_lrs": [1, 2, 3]})
    with pytest.raises(CheckpointError, match="schedule for 3 parameter groups"):
        build(odd, DeepSpeedOptions())


DYNAMIC = {
    "cur_scale": 128.0,
    "cur_iter": 9,
    "last_overflow_iter": 4,
    "scale_factor": 2.0,
    "scale_window": 2,
    "min_scale": 1.0,
    "delayed_shift": 2,
    "cur_hysteresis": 1,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_loss_scaler_goes_on(
    tmp_path: Path, viewed: Make, written: Make, adam: Make, stage: Any
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, scaler=DYNAMIC)
    state = written(view, tmp_path / "t", DeepSpeedOptions(stage=stage, dtype="fp16")).optimizer(0)
    scaler = state["loss_scaler"]
    assert type(scaler).path == "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"
    assert vars(scaler) == {"arguments": (), **DYNAMIC, "dynamic": True, "dtype": torch.float16}
    assert state["dynamic_loss_scale"] is True
    plain = written(view, tmp_path / "p", DeepSpeedOptions(stage=stage)).optimizer(0)
    assert type(plain["loss_scaler"]).path.endswith(".LossScaler")
    assert plain["loss_scaler"].cur_scale == 1.0


def test_scalers_of_others_are_translated(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    torchs = {"scale": 512.0, "growth_factor": 2.0, "growth_interval": 5, "_growth_tracker": 3}
    options = DeepSpeedOptions(dtype="fp16")
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, scaler=torchs, step=10)
    scaler = written(view, tmp_path / "t", options).optimizer(0)["loss_scaler"]
    assert (scaler.cur_scale, scaler.scale_window) == (512.0, 5)
    assert scaler.cur_iter - scaler.last_overflow_iter - 1 == 3
    static = viewed(tmp_path / "f", adam(SHAPES), hyper=HYPER, scaler={"cur_scale": 64})
    state = written(static, tmp_path / "g", options).optimizer(0)
    assert (state["loss_scaler"].cur_scale, state["dynamic_loss_scale"]) == (64.0, False)
    made = written(viewed(tmp_path / "n", adam(SHAPES), hyper=HYPER), tmp_path / "o", options)
    assert made.optimizer(0)["loss_scaler"].cur_scale == 65536.0
    assert any("no loss scaler" in remark for remark in made.target.remarks)


def test_stage_0_keeps_the_scaler_as_numbers(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, scaler=DYNAMIC)
    options = DeepSpeedOptions(stage=0, dtype="fp16")
    optimizer = written(view, tmp_path / "t", options).model()["optimizer"]
    numbers = {key: value for key, value in optimizer.items() if not isinstance(value, dict | list)}
    assert numbers == {
        "dynamic_loss_scale": True,
        "cur_scale": 128.0,
        "cur_iter": 9,
        "last_overflow_iter": 4,
        "scale_factor": 2.0,
        "scale_window": 2,
    }
    full = written(view, tmp_path / "u", DeepSpeedOptions(stage=0, dtype="fp32")).model()
    assert list(full["optimizer"]) == ["state", "param_groups"]
