"""What is wrong with a checkpoint or its configuration is said once, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import ModelError, SettingsError
from core_fp6 import FP6Config, quantize
from core_fp6.integrations.transformers import register

WEIGHTS = {
    "llama": "model.layers.1.mlp.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
}


@pytest.fixture(scope="module", params=WEIGHTS)
def saved(request: Any, build: Any, tmp_path_factory: Any) -> tuple[Path, str]:
    """Folder of a plain and a quantized model, and the name of a weight."""
    folder: Path = tmp_path_factory.mktemp("saved")
    model = build(request.param)
    model.save_pretrained(folder / "plain")
    quantize(model, group_size=32)
    model.save_pretrained(folder / "six")
    return folder, WEIGHTS[request.param]


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def changed(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "columns": (
        "",
        lambda t: t[:, :-4],
        r"weight does not fit .*\[256, 60\], not uint8 \[256, 64\]",
    ),
    "rows": ("", lambda t: t[:-1], r"weight does not fit .*\[255, 64\], not uint8 \[256, 64\]"),
    "plain": ("", lambda t: t.float(), "weight does not fit .* float32"),
    "scales": ("_scale", lambda t: t[:, :-1], r"weight_scale does not fit .*\[256, 3\], not"),
    "dtype": ("_scale", lambda t: t.float(), "weight_scale does not fit .* float32"),
    "NaN": ("_scale", lambda t: t * float("nan"), "_scale has values that are no scales"),
    "zero": ("_scale", lambda t: t * 0, "_scale has values that are no scales"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(saved, tmp_path, damage):
    folder, name = saved
    part, change, message = DAMAGES[damage]
    key = name + part
    path = changed(
        folder / "six",
        tmp_path / "bad",
        lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}),
    )
    with pytest.raises(ModelError, match=message):
        load(path)


@pytest.mark.parametrize("part", ["", "_hi", "_scale"])
def test_missing_tensors_are_named(saved, tmp_path, part):
    folder, name = saved
    path = changed(folder / "six", tmp_path / "bad", lambda tensors: tensors.pop(name + part))
    with pytest.raises(ModelError, match=f"{name}{part} is missing"):
        load(path)


def test_weights_of_another_shape_are_named(build, tmp_path):
    model = build("llama")
    quantize(model, group_size=0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(
        ModelError, match=r"0.mlp.down_proj.weight is not part .*192 columns.*128\]"
    ):
        load(tmp_path)
    with pytest.raises(ModelError, match="down_proj.weight is not part"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_weights_that_are_absent_are_not_made_up(build, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    quantize(model)
    model.save_pretrained(tmp_path / "six")
    lost = "model.layers.1.mlp.up_proj.weight"

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(lost)]:
            del tensors[key]

    bad = changed(tmp_path / "six", tmp_path / "bad", lose)
    with pytest.raises(ModelError, match=f"{lost} and 2 more cannot be loaded"):
        load(bad)
    bad = changed(tmp_path / "plain", tmp_path / "bad plain", lose)
    with pytest.raises(ModelError, match=f"{lost} and 2 more cannot be loaded"):
        load(bad, quantization_config=FP6Config())


def test_a_file_that_ends_early_is_refused(saved, tmp_path):
    shutil.copytree(saved[0] / "six", tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read model.safetensors"):
        load(tmp_path / "bad")


def test_values_that_codes_cannot_say_are_counted_while_loading(saved, tmp_path):
    folder, name = saved

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[[1, 5, 8]] = float("nan")

    path = changed(folder / "plain", tmp_path / "bad", spoil)
    with pytest.raises(ModelError, match=r"layers.1.mlp.*: 3 of its \d+ values are NaN"):
        load(path, quantization_config=FP6Config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout_version": 7}, r"layout_version 7: this core-fp6 reads version 1"),
        ({"format": "e9m9"}, "no format e9m9"),
        ({"format": 6}, "format 6: it is no str"),
        ({"format": "e2m2"}, "not packed as e2m2"),
        ({"group_size": 48}, "no group size 48"),
        ({"group_size": "128"}, "group_size '128': it is no int"),
        ({"group_size": True}, "group_size True: it is no int"),
        ({"group_sise": 64}, "no field 'group_sise'; did you mean 'group_size'"),
        ({"skip": "lm_head"}, "skip 'lm_head': it is no list"),
        ({"skip": None}, "skip None: it is no list"),
        ({"modules_to_not_convert": [1]}, "it is no list of names"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused_by_key_and_value(saved, tmp_path, change, message):
    shutil.copytree(saved[0] / "six", tmp_path / "bad")
    file = tmp_path / "bad" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=message):
        load(tmp_path / "bad")


def test_a_group_size_that_is_not_that_of_the_files_is_refused(saved, tmp_path):
    shutil.copytree(saved[0] / "six", tmp_path / "bad")
    file = tmp_path / "bad" / "config.json"
    file.write_text(file.read_text().replace('"group_size": 32', '"group_size": 128'))
    with pytest.raises(ModelError, match="_scale does not fit the other tensors of a e2m3-g128"):
        load(tmp_path / "bad")


def test_offloading_is_refused(saved):
    with pytest.raises(SettingsError, match="device_map uses cpu, disk"):
        load(saved[0] / "six", device_map={"model": "cpu", "lm_head": "disk"})


def test_registering_again_is_fine():
    register()
    register()


def test_a_configuration_comes_back_from_its_fields():
    config = FP6Config("e3m2", 0, ["q_proj"], modules_to_not_convert=["lm_head"])
    again = FP6Config.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.scheme.name == "e3m2-row"
