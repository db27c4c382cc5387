"""Adapters train on top of six-bit weights, which stay as they are."""

import pytest
import torch
from torch import nn

from core_fp6 import FP6Linear, quantize
from core_fp6.models.selecting import select

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(build):
    model = build("llama")
    quantize(model, group_size=64)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def test_adapters_learn_and_codes_do_not(adapted, ids):
    frozen = {name: t.clone() for name, t in adapted.state_dict().items() if "lora" not in name}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.is_floating_point() for p in trained)
    assert len(trained) == 8
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    now = adapted.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


def test_gradients_are_those_over_plain_weights(adapted, ids):
    adapted(input_ids=ids, labels=ids).loss.backward()
    ours = [p.grad.clone() for p in adapted.parameters() if p.requires_grad]
    for module in list(adapted.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FP6Linear):
                setattr(module, name, child.to_linear().requires_grad_(False))
    adapted.zero_grad()
    adapted(input_ids=ids, labels=ids).loss.backward()
    theirs = [p.grad for p in adapted.parameters() if p.requires_grad]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_adapters_are_not_merged_into_codes(adapted):
    kept = {name: t.clone() for name, t in adapted.state_dict().items() if "lora" not in name}
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()
    now = adapted.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


def test_the_whole_model_cannot_be_made_trainable(adapted):
    with pytest.raises(RuntimeError, match="floating point"):
        adapted.requires_grad_(True)


def test_adapters_over_plain_weights_are_left_out(build):
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    selection = select(model)
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    assert isinstance(selection.chosen[f"{start}.base_layer"], nn.Linear)
    assert selection.left_out[f"{start}.lora_A.default"] == "part of an adapter"


def test_preparing_a_model_for_adapters_changes_no_weight(build, ids):
    model = build("llama").to(torch.bfloat16)
    quantize(model, group_size=64)
    kept = {n: m.dequantized() for n, m in model.named_modules() if isinstance(m, FP6Linear)}
    scales = {n: t for n, t in model.state_dict().items() if n.endswith("_scale")}
    prepared = peft.prepare_model_for_kbit_training(model)
    for name, weight in kept.items():
        assert torch.equal(prepared.get_submodule(name).dequantized(), weight)
    now = prepared.state_dict()
    assert all(torch.equal(now[n], t) and now[n].dtype == t.dtype for n, t in scales.items())
    assert prepared(ids).logits.isfinite().all()
