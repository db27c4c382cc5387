"""Folders that DeepSpeed makes in rare cases are read, and those that nobody can read are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import CheckpointError
from core_ucp.sources.deepspeed import detect, open_view
from core_ucp.sources.deepspeed.folder import scan

Values = Callable[..., dict[str, Tensor]]


@pytest.fixture
def plain(writer: Any, values: Values, tmp_path: Path) -> Any:
    """A ZeRO-1 folder of two ranks."""
    groups = [{"a": values(3, 4), "b": values(5)}]
    made = writer(tmp_path / "global_step3", 2)
    made.model(0, groups)
    made.zero12(groups)
    return made


def change(path: Path, how: Callable[[Any], Any]) -> None:
    """Change what a file holds."""
    tree = torch.load(path, weights_only=False)
    how(tree)
    torch.save(tree, path)


def optimizers(folder: Path) -> list[Path]:
    """Files of the optimizer."""
    return sorted(folder.glob("*_optim_states.pt"))


def inner(path: Path, how: Callable[[Any], Any]) -> None:
    """Change the optimizer in a file."""
    change(path, lambda tree: how(tree["optimizer_state_dict"]))


def test_names_of_files(tmp_path: Path) -> None:
    for name in (
        "mp_rank_03_model_states.pt",
        "zero_pp_rank_12_mp_rank_01_model_states.pt",
        "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
        "zero_pp_rank_2_mp_rank_00_optim_states.pt",
        "layer_07-model_states.pt",
        "layer_08-model_01-model_states.pt",
        "layer_2_expert_5_mp_rank_00_model_states.pt",
        "expert_1_mp_rank_00_model_states.pt",
        "expp_rank_1_mp_rank_00_optim_states.pt",
        "zero_to_fp32.py",
        "mp_rank_00_model_states.pt.bak",
    ):
        (tmp_path / name).touch()
    found = scan(tmp_path)
    assert set(found.models) == {3}
    assert set(found.zero_models) == {(12, 1)}
    assert {prefix: set(grid) for prefix, grid in found.optimizers.items()} == {
        "bf16_": {(2, 0)},
        "": {(2, 0)},
    }
    assert set(found.layers) == {(7, 0), (8, 1)}
    assert set(found.experts) == {(2, 5, 0), (0, 1, 0)}
    assert set(found.expert_optimizers) == {(1, 0)}


def test_other_folders_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / ".metadata").touch()
    megatron = tmp_path / "iter_0000001" / "mp_rank_00"
    megatron.mkdir(parents=True)
    (megatron / "model_optim_rng.pt").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert not detect(tmp_path)
    assert not detect(tmp_path / "iter_0000001")
    assert not detect(tmp_path / "config.json")


def test_folders_of_several_tags(plain: Any) -> None:
    root = plain.path.parent
    assert detect(root)
    (root / "latest").write_text("global_step3\n")
    assert open_view(root).details["tag"] == "global_step3"


def test_parts_of_several_dtypes(plain: Any) -> None:
    def halve(tree: Any) -> None:
        tree["single_partition_of_fp32_groups"][0] = tree["single_partition_of_fp32_groups"][
            0
        ].half()

    inner(optimizers(plain.path)[1], halve)
    with pytest.raises(CheckpointError, match=r"group 0 in several dtypes"):
        open_view(plain.path)


def test_parts_that_are_too_short(plain: Any) -> None:
    def shorten(tree: Any) -> None:
        state = tree["base_optimizer_state"]["state"][0]
        state["exp_avg"] = state["exp_avg"][:-4].clone()

    path = optimizers(plain.path)[0]
    inner(path, shorten)
    with pytest.raises(CheckpointError, match="is too short") as caught:
        open_view(plain.path)
    assert path.name in str(caught.value)
    assert "exp_avg of group 0 have 6 elements and need 10" in str(caught.value)


def test_states_that_are_no_vectors(plain: Any) -> None:
    def reshape(tree: Any) -> None:
        state = tree["base_optimizer_state"]["state"][0]
        state["exp_avg"] = state["exp_avg"].view(2, -1)

    inner(optimizers(plain.path)[0], reshape)
    with pytest.raises(CheckpointError, match="holds no flat exp_avg of group 0"):
        open_view(plain.path)


def test_unknown_padding(plain: Any) -> None:
    for path in optimizers(plain.path):
        inner(path, lambda tree: tree.update(param_alignment_paddings=[[3, 1]]))
    with pytest.raises(CheckpointError, match="pads the parameters of group 0 in an unknown way"):
        open_view(plain.path)


def test_shared_parts_of_groups_of_ranks(writer: Any, values: Values, tmp_path: Path) -> None:
    made = writer(tmp_path, 4)
    made.zero3([{"w": values(7)}])
    for path in optimizers(tmp_path):
        inner(path, lambda tree: tree.update(partition_count=2))
    with pytest.raises(CheckpointError, match="cuts parameters into 2 parts among 4 ranks"):
        open_view(tmp_path)


def test_automatic_experts_of_stage_3(writer: Any, values: Values, tmp_path: Path) -> None:
    made = writer(tmp_path, 2)
    made.zero3([{"w": values(7)}])
    for path in optimizers(tmp_path):
        inner(path, lambda tree: tree.update(ds_zero_partition_groups=[{"partition_count": 1}]))
    with pytest.raises(CheckpointError, match="cuts parameters differently by group"):
        open_view(tmp_path)


def test_files_that_do_not_say_what_they_are(plain: Any) -> None:
    model = plain.path / "mp_rank_00_model_states.pt"
    whole = torch.load(model)
    for key, match in (("dp_world_size", "its dp_world_size"), ("param_shapes", "shapes of param")):
        torch.save({k: v for k, v in whole.items() if k != key}, model)
        with pytest.raises(CheckpointError, match=match):
            open_view(plain.path)
    torch.save([1], model)
    with pytest.raises(CheckpointError, match="it holds no mapping"):
        open_view(plain.path)
    torch.save(whole, model)
    torch.save({}, optimizers(plain.path)[0])
    with pytest.raises(CheckpointError, match="it holds no optimizer_state_dict"):
        open_view(plain.path)


def test_an_unknown_stage(plain: Any) -> None:
    for path in optimizers(plain.path):
        inner(path, lambda tree: tree.update(zero_stage=7))
    with pytest.raises(CheckpointError, match="unknown ZeRO stage 7"):
        open_view(plain.path)


def test_an_alias_of_nothing(plain: Any) -> None:
    model = plain.path / "mp_rank_00_model_states.pt"
    change(model, lambda tree: tree.update(shared_params={"head": "embed"}))
    with pytest.raises(CheckpointError, match="does not hold embed") as caught:
        open_view(plain.path)
    assert "head is another name of it" in str(caught.value)


def test_model_files_of_another_run(plain: Any) -> None:
    model = plain.path / "mp_rank_00_model_states.pt"
    change(model, lambda tree: tree["module"].update(a=torch.ones(2, 2).bfloat16()))
    with pytest.raises(CheckpointError, match=r"holds model\.a as \[3, 4\] and as \[2, 2\]"):
        open_view(plain.path)


def test_optimizers_without_a_name_or_settings(plain: Any) -> None:
    for path in optimizers(plain.path):
        inner(path, lambda tree: tree["base_optimizer_state"].pop("param_groups"))
    view = open_view(plain.path)
    assert view.resume.hyper == {}
    assert any("settings of the optimizer" in remark for remark in view.remarks)


def stage0(path: Path, optimizer: Any, module: dict[str, Tensor], writer: Any) -> None:
    """A folder without ZeRO."""
    made = writer(path, 2)
    made.model(0, [], module=module, optimizer=optimizer, param_shapes=None)


def fused(groups: list[list[Tensor]]) -> dict[str, Any]:
    """What the fused optimizer of fp16 saves."""
    flats = [torch.cat([tensor.view(-1) for tensor in group]) for group in groups]
    states = {i: {"exp_avg": flat * 2, "exp_avg_sq": flat * 3} for i, flat in enumerate(flats)}
    settings = [{"lr": 0.1 * i, "step": 5, "params": [i]} for i in range(len(flats))]
    return {
        "fp32_groups_flat": flats,
        "cur_scale": 128.0,
        "dynamic_loss_scale": True,
        "optimizer_state_dict": {"state": states, "param_groups": settings},
    }


def test_fused_fp16_without_zero(writer: Any, values: Values, read: Any, tmp_path: Path) -> None:
    masters = {name: values(3, 3, seed=seed)[""] for seed, name in enumerate("abcde")}
    module = {name: tensor.half() for name, tensor in masters.items()}
    groups = [[masters["b"], masters["d"]], [masters["a"], masters["e"]]]
    stage0(tmp_path, fused(groups), module, writer)
    view = open_view(tmp_path)
    view.prove()
    for name in "abde":
        assert torch.equal(read(view, f"model.{name}"), masters[name])
        assert torch.equal(read(view, f"optim.state.{name}.exp_avg"), masters[name] * 2)
        assert torch.equal(read(view, f"optim.state.{name}.exp_avg_sq"), masters[name] * 3)
        assert read(view, f"optim.state.{name}.step") == 5
    assert torch.equal(read(view, "model.c"), module["c"])  # is not trained
    assert view.resume.hyper["e"]["lr"] == 0.1
    assert view.resume.scaler["cur_scale"] == 128.0


def test_fused_fp16_whose_order_cannot_be_told(writer: Any, values: Values, tmp_path: Path) -> None:
    same = values(3)[""]
    module = {"a": same.half(), "b": same.half()}
    stage0(tmp_path, fused([[same], [same]]), module, writer)
    with pytest.raises(CheckpointError, match="in flat groups whose order cannot be told"):
        open_view(tmp_path)


def test_numbers_that_cannot_be_named(writer: Any, values: Values, tmp_path: Path) -> None:
    state = {i: {"exp_avg": torch.ones(3)} for i in range(2)}
    optimizer = {"state": state, "param_groups": [{"params": [0]}, {"params": [1]}]}
    module = {name: torch.ones(3) for name in "ab"}
    stage0(tmp_path, optimizer, module, writer)
    with pytest.raises(CheckpointError, match="names cannot be told"):
        open_view(tmp_path)


def test_weights_only(writer: Any, tmp_path: Path, read: Any) -> None:
    stage0(tmp_path, None, {"a": torch.ones(3)}, writer)
    view = open_view(tmp_path)
    assert torch.equal(read(view, "model.a"), torch.ones(3))
    assert any("holds no optimizer" in remark for remark in view.remarks)
