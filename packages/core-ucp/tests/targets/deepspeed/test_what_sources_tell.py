"""What a source tells of its run decides how files for DeepSpeed look, and which are not made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import CheckpointError
from core_ucp.settings import UcpSettings
from core_ucp.targets.deepspeed import DeepSpeedOptions, build
from core_ucp.targets.registry import target_of

SHAPES = {"up": (3, 2), "embed": (5, 2), "norm": (2,)}
HYPER = {name: {"lr": 0.1, "weight_decay": 0.1} for name in SHAPES}
Make = Callable[..., Any]


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_come_in_the_order_of_the_model(
    tmp_path: Path, viewed: Make, written: Make, adam: Make, stage: Any
) -> None:
    """Stage 0 numbers parameters, and readers know them by the order of the weights."""
    order = ["embed", "norm", "up"]
    view = viewed(tmp_path / "s", adam(SHAPES), hyper=HYPER, details={"order": order})
    made = written(view, tmp_path / "t", DeepSpeedOptions(stage=stage))
    assert list(made.model()["module"]) == order


@pytest.mark.parametrize(
    ("precision", "wanted"), [("bf16", "bf16_zero_pp_rank_0"), ("fp16", "zero_pp_rank_0")]
)
def test_a_run_goes_on_in_its_precision_though_only_masters_are_stored(
    tmp_path: Path, viewed: Make, adam: Make, precision: str, wanted: str
) -> None:
    view = viewed(tmp_path, adam(SHAPES), hyper=HYPER, details={"precision": precision})
    target = target_of("deepspeed", view, UcpSettings())
    assert f"global_step0/{wanted}_mp_rank_00_optim_states.pt" in [f.name for f in target.files]
    weights = [w.atom.dtype for w in target.wanted if w.key == "model.embed"]
    assert {str(dtype).removeprefix("torch.") for dtype in weights} == {
        "float32",
        {"bf16": "bfloat16", "fp16": "float16"}[precision],
    }


def test_an_order_can_be_set(tmp_path: Path, viewed: Make, adam: Make) -> None:
    shapes = {name: SHAPES[name] for name in sorted(SHAPES)}
    view = viewed(
        tmp_path, adam(shapes), hyper={n: HYPER[n] for n in shapes}, details={"order": []}
    )
    with pytest.raises(CheckpointError, match=r"does not tell the order[\s\S]*ucp\.order"):
        target_of("deepspeed", view, UcpSettings())
    assert target_of("deepspeed", view, UcpSettings(order=tuple(SHAPES))).files


@pytest.mark.parametrize(
    ("name", "details", "kind"),
    [
        ("moe.experts.deepspeed_experts.0.up", {}, "an expert"),
        ("3.up", {"pipeline": True}, "a layer of a pipeline"),
        ("tied_modules.embed", {"pipeline": True}, "a layer of a pipeline"),
    ],
)
def test_what_deepspeed_looks_for_in_other_files_is_refused(
    tmp_path: Path, viewed: Make, adam: Make, name: str, details: dict[str, Any], kind: str
) -> None:
    view = viewed(tmp_path, adam({name: (3, 2)}), hyper={name: {"lr": 0.1}}, details=details)
    with pytest.raises(CheckpointError, match=f"{name} .* is {kind}") as caught:
        build(view, DeepSpeedOptions())
    assert "rules" in caught.value.fix


def test_numbered_layers_of_other_models_are_no_pipeline(
    tmp_path: Path, viewed: Make, adam: Make
) -> None:
    view = viewed(tmp_path, adam({"3.up": (3, 2)}), hyper={"3.up": {"lr": 0.1}})
    assert build(view, DeepSpeedOptions()).files
