"""Adapters of peft on a model in chunks: the gradients of the model as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from core.testing import tiny
from core_fpdt import enable

WHERE = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": "all-linear"},
    "feed-forward part": {"target_modules": ["up_proj", "down_proj"]},
    "output head": {"target_modules": ["o_proj", "lm_head"]},
    "head trained as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    loss = model(**tiny.batch(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def adapted(where: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, **WHERE[where], **changes)
    return get_peft_model(tiny.llama(), config)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("pieces", [1, 2])
def test_gradients_of_adapters(where: str, pieces: int) -> None:
    model = adapted(where)
    wanted = gradients(copy.deepcopy(model))
    assert not any("q_proj.base_layer" in name for name in wanted)
    with enable(model, chunk_tokens=8, loss_chunk_bytes=16 * 1024, mlp_chunks=pieces):
        require_equal(gradients(model), wanted)


def test_adapters_that_are_merged_while_chunks_are_on() -> None:
    model = adapted("attention")
    with enable(model, chunk_tokens=8, loss_chunk_bytes=16 * 1024), torch.no_grad():
        model.eval()
        batch = tiny.batch()
        before = model(**batch).loss
        model.merge_adapter()
        after = model(**batch).loss
        with model.disable_adapter():
            without = model(**batch).loss
    assert torch.allclose(after, before, rtol=1e-4)
    assert not torch.allclose(without, before, rtol=1e-3)
