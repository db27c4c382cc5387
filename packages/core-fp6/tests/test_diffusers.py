"""Models of diffusers: quantized while they are loaded, saved, and loaded again bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.discovery import discover
from core.errors import ModelError, SettingsError
from core_fp6.integrations.config import FP6Config
from core_fp6.models.linear import FP6Linear
from core_fp6.models.quantizing import dequantize, quantize

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    discover().setup(["fp6"])


def unet() -> Any:
    """A small UNet with cross attention."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def transformer() -> Any:
    """A small transformer of Stable Diffusion 3."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
    ).eval()


MODELS = {"unet": unet, "transformer": transformer}


def answer(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    image = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    wide = model.config.get("joint_attention_dim") or model.config["cross_attention_dim"]
    text = torch.randn(1, 5, wide, generator=generator).to(dtype)
    further = {}
    if "pooled_projection_dim" in model.config:
        further["pooled_projections"] = torch.randn(1, 64, generator=generator).to(dtype)
    with torch.no_grad():
        found: torch.Tensor = model(
            image, timestep=torch.tensor([3]), encoder_hidden_states=text, **further
        ).sample
    return found


def layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FP6Linear)]


@pytest.mark.parametrize(("kind", "group_size"), [("unet", 32), ("transformer", 0)])
def test_on_load_is_the_same_as_in_memory(tmp_path: Path, kind: str, group_size: int) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(
        tmp_path / "plain", quantization_config=FP6Config(group_size=group_size, skip=["to_k"])
    )
    report = quantize(model, group_size=group_size, skip=["to_k"])
    assert layers(loaded) == layers(model) == [*report.quantized]
    assert not [name for name in layers(loaded) if name.endswith("to_k")]
    assert torch.equal(answer(loaded), answer(model))
    model.save_pretrained(tmp_path / "memory")
    loaded.save_pretrained(tmp_path / "load")
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("memory", "load"))
    assert a["quantization_config"] == b["quantization_config"]
    for folder in ("memory", "load"):
        again = type(model).from_pretrained(tmp_path / folder)
        assert torch.equal(answer(again), answer(model))


def test_shards_are_loaded_one_by_one(tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 3
    loaded = type(model).from_pretrained(tmp_path / "plain", quantization_config=FP6Config())
    quantize(model)
    assert torch.equal(answer(loaded), answer(model))
    loaded.save_pretrained(tmp_path / "six", max_shard_size="30KB")
    assert len(list((tmp_path / "six").glob("*.safetensors"))) > 3
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "six")), answer(model))


def test_another_dtype_leaves_codes_and_scales_alone(tmp_path: Path) -> None:
    model = transformer()
    quantize(model, group_size=0)
    model.save_pretrained(tmp_path / "six")
    half = type(model).from_pretrained(tmp_path / "six", torch_dtype=torch.float16)
    scales = [n for n, p in half.named_parameters() if n.endswith("weight_scale")]
    assert scales
    for name in scales:
        assert half.get_parameter(name).dtype == torch.float32
        assert torch.equal(half.get_parameter(name), model.get_parameter(name))
    assert half.pos_embed.proj.weight.dtype == torch.float16
    torch.testing.assert_close(answer(half).float(), answer(model), rtol=0.05, atol=0.05)


def test_a_fresh_process_loads_it_bit_for_bit(tmp_path: Path) -> None:
    model = unet()
    quantize(model, group_size=32)
    model.save_pretrained(tmp_path / "six")
    torch.save(answer(model), tmp_path / "answer.pt")
    script = f"""
import core, sys, torch
core.start(quiet=True).close()
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_diffusers import answer, diffusers
model = diffusers.UNet2DConditionModel.from_pretrained({str(tmp_path / "six")!r})
print(torch.equal(answer(model), torch.load({str(tmp_path / "answer.pt")!r})))
"""
    words = [sys.executable, "-c", script]
    ended = subprocess.run(words, check=True, capture_output=True, text=True)
    assert ended.stdout.split() == ["True"]


def test_it_becomes_plain_again(tmp_path: Path) -> None:
    model = transformer()
    quantize(model)
    expected = answer(model)
    model.save_pretrained(tmp_path / "six")
    loaded = type(model).from_pretrained(tmp_path / "six")
    for plain in (loaded.dequantize(), dequantize(model)):
        assert not layers(plain)
        plain.save_pretrained(tmp_path / "plain")
        again = type(model).from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(answer(again), expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_is_quantized_on_load_by_the_name_of_the_method() -> None:
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="core_fp6", quant_kwargs={"group_size": 64}, components_to_quantize=["unet"]
    )
    made = config._resolve_quant_config(is_diffusers=True, module_name="unet")
    assert isinstance(made, FP6Config)
    assert made.group_size == 64


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = transformer()
    name = "transformer_blocks.0.attn.to_q"
    with torch.no_grad():
        model.get_submodule(name).weight[0, :3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match=f"{name}.weight(.|\n)*3 of its"):
        type(model).from_pretrained(tmp_path / "nan", quantization_config=FP6Config())
    with pytest.raises(SettingsError, match="no module of the model matches"):
        type(model).from_pretrained(
            tmp_path / "nan", quantization_config=FP6Config(skip=["no_such"])
        )
    model = transformer()
    quantize(model)
    model.save_pretrained(tmp_path / "six")
    path = tmp_path / "six" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layout_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="layout_version 2"):
        type(model).from_pretrained(tmp_path / "six")


def test_planes_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = transformer()
    quantize(model)
    model.save_pretrained(tmp_path / "six")
    (file,) = (tmp_path / "six").glob("*.safetensors")
    content = load_file(file)
    missing = "transformer_blocks.1.ff.net.2.weight_hi"
    save_file({k: v for k, v in content.items() if k != missing}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{missing} cannot be loaded"):
        type(model).from_pretrained(tmp_path / "six")
