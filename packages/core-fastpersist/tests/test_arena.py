"""Adopted training goes on as before, and its checkpoints are written without a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import CheckpointError
from core_fastpersist import adopt, load, save
from core_fastpersist.direct.alignment import alignment_of


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids = torch.arange(64).reshape(2, 32)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_bit_for_bit() -> None:
    plain, moved = llama(), llama()
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (plain, moved)]
    for model, optimizer in zip((plain, moved), optimizers, strict=True):
        train(model, optimizer, 1)
    names = {id(parameter) for parameter in moved.parameters()}
    found = adopt(moved, optimizers[1])
    assert {id(parameter) for parameter in moved.parameters()} == names
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    assert not found.left
    for model, optimizer in zip((plain, moved), optimizers, strict=True):
        train(model, optimizer, 3)
    for (name, left), right in zip(
        plain.state_dict().items(), moved.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_nearly_all_bytes_go_to_the_disk_without_a_copy(tmp_path: Path) -> None:
    if not alignment_of(tmp_path).direct:
        pytest.skip(f"no direct I/O here: {alignment_of(tmp_path).reason}")
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    before = save(state, tmp_path / "before")
    adopted = adopt(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    after = save(state, tmp_path / "after")
    assert after.straight > 0.98 * adopted.nbytes
    assert after.copied < 0.02 * after.bytes + 2**17
    assert after.straight > before.straight


def test_a_replaced_tensor_is_saved_with_its_new_values(tmp_path: Path) -> None:
    model = llama()
    adopt(model)
    with torch.no_grad():
        model.model.norm.weight = nn.Parameter(torch.full((256,), 7.0))
        model.model.layers[0].mlp.up_proj.weight.data = torch.full((512, 256), 3.0)
        model.model.layers[1].mlp.up_proj.weight.data.fill_(5)
    save(model.state_dict(), tmp_path / "model")
    found = load(tmp_path / "model")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_what_cannot_be_moved_stays_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.zeros(4, 8)
            self.part = nn.Parameter(base[:2])
            self.turned = nn.Parameter(torch.zeros(8, 4).t())
            self.plain = nn.Parameter(torch.zeros(4))

    odd = Odd()
    found = adopt(odd)
    assert found.tensors == 1
    assert "larger tensor" in found.left["part"]
    assert "row by row" in found.left["turned"]


def test_only_modules_and_optimizers_are_adopted() -> None:
    with pytest.raises(CheckpointError, match="cannot adopt a dict"):
        adopt({"w": torch.zeros(3)})  # type: ignore[arg-type]


def test_memory_goes_with_the_tensors() -> None:
    import gc

    model = nn.Linear(512, 512)
    adopt(model)
    weight = model.weight.detach()
    del model
    gc.collect()
    assert weight.sum().isfinite()
