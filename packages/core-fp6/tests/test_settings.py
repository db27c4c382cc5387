"""Settings are checked by name, and reach the model of a run that enables the plugin."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.contributions import MODEL, PIPELINE, Transform
from core.discovery import discover
from core.errors import ModelError, PlanError, SettingsError
from core.hooks import Hooks
from core.run import Run
from core.testing import tiny
from core.testing.fixtures import make_run
from core_fp6.models.linear import FP6Linear

Core = Callable[..., Any]


def run_with(folder: Path, **fp6: Any) -> Run:
    return make_run(folder / "run", plugins=discover(), enable=["fp6"], fp6=fp6)


@pytest.mark.parametrize(
    ("fp6", "message"),
    [
        ({"format": "e5m2"}, "fp6.format = 'e5m2'"),
        ({"group_size": 16}, "fp6.group_size = 16"),
        ({"skip": "lm_head"}, "fp6.skip"),
        ({"groupsize": 64}, "did you mean 'group_size'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    tmp_path: Path, fp6: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run_with(tmp_path, **fp6)


def test_the_model_of_a_run_is_quantized_as_the_settings_say(tmp_path: Path) -> None:
    model: Any = tiny.llama()
    with run_with(tmp_path, format="e3m2", group_size=64, skip=["o_proj"]) as run:
        assert run.apply(MODEL, model) is model
        with pytest.raises(PlanError, match="already applied"):
            run.apply(MODEL, model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, FP6Linear)}
    assert len(found) == 18
    assert not [name for name in found if name.endswith("o_proj")]
    assert {module.scheme.name for module in found.values()} == {"e3m2-g64"}
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert not isinstance(model.lm_head, FP6Linear)


def test_installed_is_not_enabled(tmp_path: Path) -> None:
    model = tiny.llama()
    with make_run(tmp_path / "run", plugins=discover()) as run:
        run.apply(MODEL, model)
    assert not any(isinstance(module, FP6Linear) for module in model.modules())


def test_a_pattern_that_matches_nothing_stops_the_run(tmp_path: Path) -> None:
    with (
        run_with(tmp_path, skip=["no_such"]) as run,
        pytest.raises(SettingsError, match="no module of the model matches"),
    ):
        run.apply(MODEL, tiny.llama())


def test_a_quantized_model_is_saved_and_loaded_by_a_run(tmp_path: Path) -> None:
    with run_with(tmp_path) as run:
        model, other = run.apply(MODEL, tiny.llama()), run.apply(MODEL, tiny.llama(seed=1))
        run.save({"model": model}, 1).durable()
        run.load({"model": other})
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


class Pipeline:
    """What a diffusers pipeline looks like from outside."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


def test_the_denoiser_of_a_pipeline_is_quantized(tmp_path: Path) -> None:
    def part() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU())

    pipeline = Pipeline(unet=part(), text_encoder=part(), transformer=None)
    with run_with(tmp_path) as run:
        assert run.apply(PIPELINE, pipeline) is pipeline
        with pytest.raises(ModelError, match="no transformer, transformer_2 or unet"):
            run.apply(PIPELINE, Pipeline(vae=part()))
    assert isinstance(pipeline.unet[0], FP6Linear)
    assert not isinstance(pipeline.text_encoder[0], FP6Linear)


def test_contributions_are_equal_after_a_journey(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", plugins=discover()) as run:
        specs: list[Any] = [Hooks.core_recipes, Hooks.core_probes]
        found = [c.value for spec in specs for c in run.plugins.collect_from(["fp6"], spec)]
        found += [c.value for c in run.plugins.collect_from(["fp6"], Hooks.core_transforms, run)]
    assert len(found) == 5
    assert sum(isinstance(value, Transform) for value in found) == 2
    for value in found:
        assert pickle.loads(pickle.dumps(value)) == value


def child(script: str) -> list[str]:
    """What a fresh interpreter prints."""
    words = [sys.executable, "-c", script]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()


def test_setting_up_imports_nothing_and_registers_when_it_matters() -> None:
    script = """
import core, sys
core.start(quiet=True).close()
core.start(quiet=True).close()
print("torch" in sys.modules, "transformers" in sys.modules, "diffusers" in sys.modules)
print(sum(type(finder).__module__ == "core_fp6.registering" for finder in sys.meta_path))
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
print(configs["core_fp6"].__name__)
core.start(quiet=True).close()
from transformers.quantizers import AutoHfQuantizer
made = AutoHfQuantizer.from_config({"quant_method": "core_fp6", "group_size": 64})
print(type(made).__name__, made.quantization_config.group_size)
"""
    assert child(script) == [
        *("False", "False", "False"),
        "1",
        "FP6Config",
        *("FP6HfQuantizer", "64"),
    ]
