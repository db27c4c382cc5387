"""Shapes come from configurations, and are refused where they do not explain the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.errors import ModelError, SettingsError
from core_fpdt.planning import SHAPES, plan
from core_fpdt.planning.hardware import hardware
from core_fpdt.planning.job import Job
from core_fpdt.planning.shape import from_config, from_name
from core_fpdt.planning.units import parse_bytes, parse_tokens

PUBLISHED = {
    "llama-3-8b": 8.03e9,
    "llama-3-70b": 70.6e9,
    "llama-3.1-405b": 405.9e9,
    "llama-3.2-1b": 1.24e9,
    "llama-3.2-3b": 3.21e9,
    "mistral-7b": 7.24e9,
    "mixtral-8x7b": 46.7e9,
    "qwen3-8b": 8.19e9,
    "qwen3-32b": 32.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "gpt-2.7b": 2.65e9,
    "gpt-6.7b": 6.65e9,
    "gpt-13b": 12.85e9,
    "gpt-30b": 30.0e9,
    "gpt-175b": 174.6e9,
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_models_have_their_parameters(name: str) -> None:
    assert SHAPES[name].parameters == pytest.approx(PUBLISHED[name], rel=0.005)


WIDE = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 96}
INNER = {"intermediate_size": 640, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": INNER,
    "Mistral": INNER,
    "Qwen3": INNER | {"head_dim": 64},
    "Phi3": INNER | {"pad_token_id": 0},
    "Gemma": INNER | {"head_dim": 64},
    "GPT2": {"max_position_embeddings": 512},
    "GPTNeoX": {"intermediate_size": 640},
    "Mixtral": INNER,
    "Qwen3Moe": INNER | {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_explain_their_models(family: str) -> None:
    config: Any = getattr(transformers, f"{family}Config")(**WIDE, **FAMILIES[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == pytest.approx(parameters, rel=0.02)
    assert shape.gated is (family not in ("GPT2", "GPTNeoX"))
    assert (shape.layers, shape.heads) == (3, 8)
    assert shape.key_heads == (8 if family in ("GPT2", "GPTNeoX") else 2)
    experts = {"Mixtral": (8, 2), "Qwen3Moe": (4, 2)}.get(family, (1, 1))
    assert (shape.experts, shape.active) == experts


def test_windows_of_layers() -> None:
    mistral = transformers.MistralConfig(sliding_window=4096, num_hidden_layers=3)
    assert from_config(mistral).window_counts == {4096: 3}
    gemma = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=512)
    assert from_config(gemma).window_counts == {0: 1, 512: 5}
    assert from_config(transformers.LlamaConfig(num_hidden_layers=2)).window_counts == {0: 2}


def test_nothing_is_allocated_for_a_large_model() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    assert from_config(config).parameters == SHAPES["llama-3-70b"].parameters


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.DeepseekV3Config(num_hidden_layers=2), "keys and values are compressed"),
        (transformers.Qwen3NextConfig(num_hidden_layers=4, num_experts=16), "its sizes explain"),
        (transformers.MambaConfig(num_hidden_layers=2), "AttributeError"),
    ],
)
def test_models_that_are_made_otherwise_are_refused(config: Any, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        from_config(config)


def test_a_configuration_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="the shape of clip_vision_model cannot be read"):
        from_config(transformers.CLIPVisionConfig())


def test_folders(tmp_path: Path) -> None:
    transformers.LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert from_name(str(tmp_path)).layers == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        from_name(str(tmp_path))
    with pytest.raises(ModelError, match="did you mean 'llama-3-8b'"):
        from_name("llama-3-8")


def test_a_model_can_be_planned_by_its_configuration() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=1000)
    assert plan(config, 4096).job.shape.layers == 2


@pytest.mark.parametrize(
    ("text", "tokens"), [("2M", 2**21), ("128k", 2**17), ("1.5K", 1536), ("7", 7), (" 1 G ", 2**30)]
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "2X", "1e3", "2MB", "0.3", "1" * 40, "NaN", "٢M"])
def test_wrong_tokens(text: str) -> None:
    with pytest.raises(SettingsError, match="is no number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * 2**30), ("1TB", 10**12), ("1tib", 2**40), ("512", 512), ("3 K", 3072)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "-3GiB", "80Gb/s", "80GiX", "1" * 40, "0.1"])
def test_wrong_bytes(text: str) -> None:
    with pytest.raises(SettingsError, match="is no number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sequence": 0}, "0 tokens"),
        ({"sequence": 2**50}, "tokens cannot be planned"),
        ({"gpus": 0}, "0 devices"),
        ({"gpus": 6, "ranks": 4}, "6 devices cannot be groups of 4"),
        ({"gpus": 64, "ranks": 64}, "64 ranks cannot share"),
    ],
)
def test_impossible_jobs(fields: dict[str, int], match: str) -> None:
    given: dict[str, Any] = {"sequence": 1024, **fields}
    with pytest.raises(SettingsError, match=match):
        Job(shape=SHAPES["llama-3-8b"], hardware=hardware("h100"), **given)


def test_impossible_hardware() -> None:
    with pytest.raises(SettingsError, match="did you mean 'a100'"):
        hardware("a10")
    with pytest.raises(SettingsError, match="link of h100 must be above 0"):
        hardware("h100").changed(link=0)


def test_planning_leaves_the_default_device_alone() -> None:
    from_config(transformers.LlamaConfig(num_hidden_layers=1))
    assert torch.empty(0).device.type == "cpu"
