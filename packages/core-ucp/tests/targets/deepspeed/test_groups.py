"""Parameter groups, their order, hyper-parameters and steps: kept, regrouped, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.targets.deepspeed import DeepSpeedOptions, build

SHAPES = {"embed": (5, 2), "norm": (2,), "up": (3, 2), "bias": (3,)}
DECAY = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
PLAIN = {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0}
HYPER = {"embed": DECAY, "up": DECAY, "norm": PLAIN, "bias": PLAIN}
Make = Callable[..., Any]


def groups(made: Any) -> list[list[str]]:
    return [list(named) for named in made.model()["param_shapes"]]


def test_parameters_with_equal_settings_are_one_group(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    made = written(
        viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER), tmp_path / "t", DeepSpeedOptions()
    )
    assert groups(made) == [["embed", "up"], ["norm", "bias"]]
    first, second = made.base(0)["param_groups"]
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    assert (first["params"], second["params"]) == ([0], [1])
    assert first["bias_correction"] is True


def test_groups_that_the_source_tells_are_kept_though_they_are_equal(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    told = {"groups": [["norm", "embed"], ["up", "bias"]]}
    hyper = dict.fromkeys(SHAPES, DECAY)
    view = viewed(tmp_path / "s", adam(SHAPES), details=told, hyper=hyper)
    made = written(view, tmp_path / "t", DeepSpeedOptions(stage=3))
    assert groups(made) == told["groups"]


def test_order_and_groups_can_be_named(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER)
    order = ("bias", "up", "norm", "embed")
    made = written(view, tmp_path / "t", DeepSpeedOptions(order=order))
    assert groups(made) == [["bias", "norm"], ["up", "embed"]]
    named = (("bias",), ("up", "embed"), ("norm",))
    made = written(view, tmp_path / "u", DeepSpeedOptions(groups=named))
    assert groups(made) == [list(names) for names in named]
    assert [group["weight_decay"] for group in made.base(0)["param_groups"]] == [0.0, 0.1, 0.0]


def test_an_order_that_only_the_source_has_is_remarked(
    tmp_path: Path, viewed: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, details={"order": []})
    for stage in (0, 1, 2, 3):
        target = build(view, DeepSpeedOptions(stage=stage))
        assert any("by their order" in remark for remark in target.remarks)
    told = build(view, DeepSpeedOptions(order=tuple(SHAPES)))
    assert not any("by their order" in remark for remark in told.remarks)


def test_names_in_alphabetical_order_are_no_order(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    shapes, hyper = ({name: of[name] for name in sorted(of)} for of in (SHAPES, HYPER))
    view = viewed(tmp_path / "s", adam(shapes), hyper=hyper, details={"order": []})
    with pytest.raises(CheckpointError, match=r"does not tell the order[\s\S]*named_parameters"):
        build(view, DeepSpeedOptions())
    made = written(view, tmp_path / "t", DeepSpeedOptions(order=tuple(SHAPES)))
    assert groups(made) == [["embed", "up"], ["norm", "bias"]]


def test_all_in_one_group_follow_the_model_and_not_the_groups(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    details = {"groups": [["embed", "up"], ["norm", "bias"]], "order": list(SHAPES)}
    hyper = dict.fromkeys(("embed", "up", "norm", "bias"), DECAY)
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=hyper, details=details)
    made = written(view, tmp_path / "t", DeepSpeedOptions(groups="one"))
    assert groups(made) == [["embed", "norm", "up", "bias"]]


def test_empty_parameters_are_only_in_torchs_own_optimizer(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    shapes = {"embed": (5, 2), "empty": (0, 3), "norm": (2,)}
    hyper = dict.fromkeys(shapes, DECAY)
    view = viewed(tmp_path / "s", adam(shapes), hyper=hyper, details={"buffers": []})
    for stage, dtype, count in ((0, "fp32", 3), (0, "bf16", 2), (1, "fp32", 2), (3, "fp32", 2)):
        options = DeepSpeedOptions(stage=stage, dtype=dtype)
        made = written(view, tmp_path / f"{stage}-{dtype}", options)
        if stage:
            assert groups(made) == [["embed", "norm"]]
            continue
        base = made.model()["optimizer"]
        base = base.get("optimizer_state_dict", base)
        assert base["param_groups"][0]["params"] == list(range(count))
    del hyper["empty"]
    view = viewed(tmp_path / "u", adam(shapes), hyper=hyper, details={"buffers": []})
    options = DeepSpeedOptions(stage=0, dtype="fp32", groups=(("embed", "norm"), ("empty",)))
    base = written(view, tmp_path / "w", options).model()["optimizer"]
    assert base["param_groups"] == [
        {**DECAY, "bias_correction": True, "params": [0, 1]},
        {"params": [2]},
    ]


def test_one_group_needs_equal_settings(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER)
    with pytest.raises(CheckpointError, match=r"embed and norm cannot .* weight_decay is 0\.1"):
        build(view, DeepSpeedOptions(groups="one"))
    options = DeepSpeedOptions(groups="one", hyper={"weight_decay": 0.05})
    made = written(view, tmp_path / "t", options)
    assert groups(made) == [["embed", "norm", "up", "bias"]]
    assert made.base(0)["param_groups"][0]["weight_decay"] == 0.05


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"order": ("embed", "norm", "up")}, "order must name .* lacks bias"),
        ({"order": ("embed", "norm", "up", "bias", "bias")}, "order must name .* fit bias"),
        ({"order": ("embed", "norms")}, "no weight 'norms'; did you mean 'norm'"),
        ({"groups": (("embed",), ("norm",))}, "groups must name .* lacks bias"),
        ({"groups": (tuple(SHAPES), ())}, "group of the options is empty"),
        ({"frozen": ("down",)}, "no weight 'down'"),
        ({"buffers": ("down",)}, "no weight 'down'"),
        ({"frozen": tuple(SHAPES)}, "no parameter that is trained"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    tmp_path: Path, viewed: Make, adam: Make, options: dict[str, Any], problem: str
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER)
    with pytest.raises(CheckpointError, match=problem):
        build(view, DeepSpeedOptions(**options))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"stage": 4}, "no ZeRO stage 4"),
        ({"dtype": "fp8"}, "'fp8' is none of"),
        ({"world_size": 0}, "0 ranks"),
        ({"sub_group_size": 0}, "holds nothing"),
        ({"tag": "../up"}, "is no tag"),
        ({"tensor_parallel": 2}, "tensor-parallel 2, pipeline 1 and expert 1"),
        ({"pipeline_parallel": 2}, "data-parallel runs only"),
        ({"expert_parallel": 2}, "data-parallel runs only"),
    ],
)
def test_runs_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        DeepSpeedOptions(**options)


def test_moments_without_hyper_parameters_are_refused_unless_they_are_given(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    view = viewed(tmp_path / "s", adam(SHAPES))
    with pytest.raises(
        CheckpointError, match=r"no hyper-parameters for embed[\s\S]*options \(hyper\)"
    ):
        build(view, DeepSpeedOptions())
    made = written(view, tmp_path / "t", DeepSpeedOptions(hyper=DECAY))
    assert made.base(0)["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("stage", [1, 3])
def test_steps_that_differ_in_a_buffer_are_refused(
    tmp_path: Path, viewed: Make, written: Make, adam: Make, stage: Any
) -> None:
    tensors = adam(SHAPES) | {"optim.state.up.step": torch.tensor(4.0)}
    view = viewed(tmp_path / "s", tensors, hyper=HYPER)
    with pytest.raises(CheckpointError, match=r"embed and up .* step is 3\.0 for one and 4\.0"):
        build(view, DeepSpeedOptions(stage=stage))
    apart = (("embed",), ("up",), ("norm", "bias"))
    made = written(view, tmp_path / "t", DeepSpeedOptions(stage=stage, groups=apart))
    states = made.base(0)["state"]
    assert [float(states[index]["step"]) for index in range(3)] == [3.0, 4.0, 3.0]


def test_steps_may_differ_in_stage_0(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    tensors = adam(SHAPES) | {"optim.state.up.step": torch.tensor(4.0)}
    made = written(
        viewed(tmp_path / "s", tensors, hyper=HYPER), tmp_path / "t", DeepSpeedOptions(stage=0)
    )
    optimizer = made.model()["optimizer"]
    states = optimizer["optimizer_state_dict"]["state"]
    assert [float(states[index]["step"]) for index in range(4)] == [3.0, 4.0, 3.0, 3.0]
    masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
    for index, name in enumerate(["embed", "up", "norm", "bias"]):
        assert torch.equal(masters[index], tensors[f"model.{name}"])
        assert torch.equal(states[index]["exp_avg"], tensors[f"optim.state.{name}.exp_avg"])


def test_a_step_that_is_no_tensor_is_taken_from_the_run(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    tensors = {key: tensor for key, tensor in adam(SHAPES).items() if not key.endswith(".step")}
    view = viewed(tmp_path / "s", tensors, hyper=HYPER, step=9)
    for stage in (0, 1, 3):
        made = written(view, tmp_path / str(stage), DeepSpeedOptions(stage=stage))
        base = made.base(0) if stage else made.model()["optimizer"]["optimizer_state_dict"]
        assert torch.equal(base["state"][1]["step"], torch.tensor(9.0))
    with pytest.raises(CheckpointError, match="moments of an optimizer and not its step"):
        build(viewed(tmp_path / "none", tensors, hyper=HYPER), DeepSpeedOptions())


def test_states_that_are_missing_are_zeros_as_deepspeed_keeps_them(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    tensors = {k: t for k, t in adam(SHAPES).items() if not k.startswith("optim.state.up.")}
    made = written(viewed(tmp_path / "s", tensors, hyper=HYPER), tmp_path / "t", DeepSpeedOptions())
    assert not made.tensors()["optim.state.up.exp_avg"].any()
    assert any("exp_avg of up" in remark for remark in made.target.remarks)


def test_an_optimizer_without_states_is_kept(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    weights = {key: tensor for key, tensor in adam(SHAPES).items() if key.startswith("model.")}
    view = viewed(tmp_path / "s", weights, hyper={name: {"lr": 0.5} for name in SHAPES})
    for stage in (1, 3):
        made = written(view, tmp_path / str(stage), DeepSpeedOptions(stage=stage, world_size=2))
        assert made.base(1) == {"state": {}, "param_groups": [{"lr": 0.5, "params": [0]}]}
        assert made.tensors().keys() == weights.keys()


def test_states_with_fewer_dimensions_fit_only_stage_0(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    weights = {"model.up": torch.randn(3, 2), "optim.state.up.exp_avg_sq_row": torch.randn(3)}
    view = viewed(tmp_path / "s", weights, hyper={"up": {"lr": 0.5}})
    for stage in (1, 2, 3):
        with pytest.raises(
            CheckpointError, match="exp_avg_sq_row of up cannot lie in a flat buffer"
        ):
            build(view, DeepSpeedOptions(stage=stage))
    made = written(view, tmp_path / "t", DeepSpeedOptions(stage=0))
    states = made.model()["optimizer"]["optimizer_state_dict"]["state"]
    assert torch.equal(states[0]["exp_avg_sq_row"], weights["optim.state.up.exp_avg_sq_row"])


def test_states_of_half_precision_keep_it(
    tmp_path: Path, viewed: Make, written: Make, adam: Make
) -> None:
    tensors = adam(SHAPES)
    for name in SHAPES:
        tensors[f"optim.state.{name}.exp_avg"] = tensors[f"optim.state.{name}.exp_avg"].bfloat16()
    view = viewed(tmp_path / "s", tensors, hyper=HYPER)
    for stage in (1, 3):
        found = written(
            view, tmp_path / str(stage), DeepSpeedOptions(stage=stage, world_size=3)
        ).tensors()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor)
