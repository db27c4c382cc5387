"""Folders that we make for transformers: ``from_pretrained`` finds every bit, and tied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from core.errors import CheckpointError
from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources import dcp as dcp_source, full, huggingface
from core_ucp.targets.huggingface import HuggingFaceOptions, build
from core_ucp.view.view import View

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4)


def made(view: View, folder: Path, options: HuggingFaceOptions | None = None) -> Path:
    folder.mkdir()
    execute(plan(view, build(view, options)), folder)
    return folder


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA) if kind == "llama" else GPT2LMHeadModel(GPT2)


def same(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("limit", [6_000, 2**30])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_what_dcp_saved(kind: str, limit: int, tmp_path: Path) -> None:
    model = model_of(kind)
    config = tmp_path / "config"
    model.config.save_pretrained(config)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    options = HuggingFaceOptions(config=config, limit=limit)
    folder = made(dcp_source.open_view(tmp_path / "dcp"), tmp_path / "out", options)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(loaded, model)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (limit < 2**30)


def test_tied_weights_are_left_to_the_configuration(tmp_path: Path) -> None:
    model = model_of("gpt2")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.config.save_pretrained(tmp_path)
    view = full.open_view(tmp_path / "model.pt")
    assert view.aliases == {"lm_head.weight": "transformer.wte.weight"}
    folder = made(view, tmp_path / "out")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert same(AutoModelForCausalLM.from_pretrained(folder), model)


def test_another_dtype_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "in")
    view = huggingface.open_view(tmp_path / "in")
    folder = made(view, tmp_path / "out", HuggingFaceOptions(dtype=torch.bfloat16))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same(loaded, model.to(torch.bfloat16))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_configuration_follows_the_weights(tmp_path: Path) -> None:
    """A configuration that says bfloat16 would round weights that are kept in full precision."""
    model = model_of("llama")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    LlamaConfig(**{**LLAMA.to_dict(), "dtype": "bfloat16"}).save_pretrained(tmp_path)
    folder = made(full.open_view(tmp_path / "model.pt"), tmp_path / "out")
    assert same(AutoModelForCausalLM.from_pretrained(folder), model)


def test_the_tokenizer_is_carried_along(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    folder = made(huggingface.open_view(tmp_path / "in"), tmp_path / "out")
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "generation_config.json").is_file()


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "model": {"w": torch.ones(2)},
        "optim": {"state": {"w": {"exp_avg": torch.ones(2)}}},
    }
    dcp.save(state, checkpoint_id=tmp_path / "in")
    target = build(dcp_source.open_view(tmp_path / "in"))
    assert any("1 tensors of optimizers" in remark for remark in target.remarks)
    assert any("config.json" in remark for remark in target.remarks)


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    state = {"good": torch.ones(2), "odd": torch.ones(2, dtype=torch.complex128)}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="'odd'") as caught:
        build(full.open_view(tmp_path / "model.pt"))
    assert "complex128" in caught.value.why


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    view = full.open_view(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="has no config.json"):
        build(view, HuggingFaceOptions(config=tmp_path))


def test_a_source_without_weights_is_refused(tmp_path: Path) -> None:
    state = {"optim": {"state": {"w": {"exp_avg": torch.ones(2)}}}}
    dcp.save(state, checkpoint_id=tmp_path / "in")
    with pytest.raises(CheckpointError, match="has no weights"):
        build(dcp_source.open_view(tmp_path / "in"))
