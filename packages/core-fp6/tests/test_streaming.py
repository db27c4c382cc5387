"""A folder that is converted in pieces is the one that the model would have been saved into."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from core.testing import tiny
from core_fp6.inspecting import inspect_folder
from core_fp6.models.quantizing import dequantize, quantize
from core_fp6.streaming.dequantizing import dequantize_folder
from core_fp6.streaming.quantizing import quantize_folder

Folders = Callable[..., Path]
MODELS = ["Llama", "Phi3", "Mixtral"]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def require_same(left: Path, right: Path) -> None:
    """Two folders hold the same tensors, bit for bit."""
    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def digests(folder: Path) -> dict[str, str]:
    """What lies in a folder, to see whether it changes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# What comes out


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("fmt", "group_size"), [("e2m3", 32), ("e3m2", 0)])
def test_it_is_what_the_quantized_model_would_be_saved_as(
    folders: Folders, tmp_path: Path, family: str, fmt: str, group_size: int
) -> None:
    source, before = folders(family), digests(folders(family))
    told = quantize_folder(source, tmp_path / "pieces", fmt, group_size, shard_size=20_000)
    model = load(source)
    expected = quantize(model, fmt, group_size)
    model.save_pretrained(tmp_path / "whole")
    require_same(tmp_path / "pieces", tmp_path / "whole")
    assert told.json() == expected.json()
    section = config_of(tmp_path / "pieces")["quantization_config"]
    assert section == config_of(tmp_path / "whole")["quantization_config"]
    assert digests(source) == before


@pytest.mark.parametrize("family", [*MODELS, "Qwen2Moe"])
def test_the_model_loads_and_computes_the_same(
    folders: Folders, tmp_path: Path, family: str
) -> None:
    changes = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    source = folders(family, **(changes if family == "Qwen2Moe" else {}))
    quantize_folder(source, tmp_path / "six", group_size=32)
    model, loaded = load(source), load(tmp_path / "six")
    quantize(model, group_size=32)
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("family", MODELS)
def test_it_comes_back_as_what_the_codes_stand_for(
    folders: Folders, tmp_path: Path, family: str
) -> None:
    source = folders(family)
    quantize_folder(source, tmp_path / "six", group_size=64)
    dequantize_folder(tmp_path / "six", tmp_path / "plain")
    model = load(source)
    quantize(model, group_size=64)
    dequantize(model).save_pretrained(tmp_path / "expected")
    require_same(tmp_path / "plain", tmp_path / "expected")
    assert config_of(tmp_path / "plain") == config_of(source)
    # Rounding again changes nothing: the values are codes times scales.
    quantize_folder(tmp_path / "plain", tmp_path / "again", group_size=64)
    dequantize_folder(tmp_path / "again", tmp_path / "plain-again")
    require_same(tmp_path / "plain", tmp_path / "plain-again")


def test_a_dtype_that_is_asked_for_is_that_of_all_weights(folders: Folders, tmp_path: Path) -> None:
    quantize_folder(folders(), tmp_path / "six")
    dequantize_folder(tmp_path / "six", tmp_path / "half", "float16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "half").values()} == {torch.float16}
    assert load(tmp_path / "half").dtype == torch.float16


def test_tied_weights_stay_tied(folders: Folders, tmp_path: Path) -> None:
    source = folders("Llama", tie_word_embeddings=True)
    report = quantize_folder(source, tmp_path / "six")
    assert "lm_head" in report.left_out
    loaded = load(tmp_path / "six")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_skipped_modules_are_copied_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    source = folders("Mixtral")
    report = quantize_folder(source, tmp_path / "six", skip=["o_proj", "layers.1.mlp.experts"])
    original, made = tensors(source), tensors(tmp_path / "six")
    plain = [name for name in made if "o_proj" in name or "layers.1.block_sparse_moe.exp" in name]
    assert len(plain) == 3 + 12
    for name in plain:
        assert torch.equal(original[name], made[name])
    assert "model.layers.1.mlp.experts" in report.left_out
    assert load(tmp_path / "six").config.quantization_config.skip == [
        "o_proj",
        "layers.1.mlp.experts",
    ]


def test_weights_stay_in_the_dtype_they_are_stored_in(folders: Folders, tmp_path: Path) -> None:
    load(folders()).bfloat16().save_pretrained(tmp_path / "bf16")
    quantize_folder(tmp_path / "bf16", tmp_path / "six")
    made = tensors(tmp_path / "six")
    assert made["model.norm.weight"].dtype == torch.bfloat16
    assert made["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    assert load(tmp_path / "six").dtype == torch.bfloat16


def test_a_single_file_and_a_base_model_are_read_too(folders: Folders, tmp_path: Path) -> None:
    """A folder of the model without its head has other names; the loader maps both."""
    model = load(folders())
    model.model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    quantize_folder(tmp_path / "base", tmp_path / "six")
    made = tensors(tmp_path / "six")
    assert made["layers.0.mlp.up_proj.weight_hi"].dtype == torch.uint8
    assert not inspect_folder(tmp_path / "six").faults


def test_what_lies_beside_the_weights_is_copied_and_other_weights_are_not(
    folders: Folders, tmp_path: Path
) -> None:
    source = copy(folders(), tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"weights of another kind")
    (source / ".git").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    target = tmp_path / "six"
    quantize_folder(source, target, shard_size=20_000)
    names = {path.name for path in target.iterdir() if path.suffix != ".safetensors"}
    assert names == {
        "additional_chat_templates",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "notes.txt",
    }
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {p.name for p in target.glob("*.safetensors")}
    assert index["weight_map"].keys() == tensors(target).keys()


def test_progress_ends_at_all_bytes(folders: Folders, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    quantize_folder(
        folders(), tmp_path / "six", progress=lambda size, total=None: told.append((size, total))
    )
    assert sum(size for size, _ in told) == told[-1][1]
    told.clear()
    dequantize_folder(
        tmp_path / "six",
        tmp_path / "plain",
        progress=lambda size, total=None: told.append((size, total)),
    )
    assert sum(size for size, _ in told) == told[-1][1]
