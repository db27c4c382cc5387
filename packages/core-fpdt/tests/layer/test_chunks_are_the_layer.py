"""Loss and gradients of a model in chunks are its own, in both orders and with every policy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import CoreError
from core.testing import tiny
from core_fpdt import enable

LENGTH = 53
POLICIES = [
    {},
    {"order": "key"},
    {"keep_output": 0.0},
    {"keep_output": 0.4, "order": "key"},
    {"keep_keys": False},
    {"keep_keys": False, "keep_output": 0.3, "order": "key"},
    {"mlp_chunks": 3},
    {"offload": "file"},
    {"offload": "file", "order": "key", "keep_output": 0.5},
]
FAMILIES = {"Llama": {}, "Mistral": {"sliding_window": 16}, "Qwen3": {}, "Phi3": {}}


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two rows, the second padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, tiny.VOCABULARY, (2, LENGTH), generator=generator)
    real = torch.ones_like(ids)
    real[1, :9] = 0
    # What the last token of padding predicts is not compared: it sees nothing.
    labels = ids.masked_fill(real == 0, -100)
    labels[1, 9] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def require_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        assert off <= tolerance, f"{name} differs by {off:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_in_every_order_with_every_policy(family: str, policy: dict[str, Any]) -> None:
    model = tiny.build(family, **FAMILIES[family]).double()
    wanted = gradients(copy.deepcopy(model), batch())
    with enable(model, chunk_tokens=13, strict=False, **policy):
        found = gradients(model, batch())
    require_close(found, wanted, 1e-11)


@pytest.mark.parametrize("chunk", [1, 7, LENGTH - 1, LENGTH, 4096])
def test_chunks_of_any_size(chunk: int) -> None:
    model = tiny.llama().double()
    wanted = gradients(copy.deepcopy(model), batch())
    with enable(model, chunk_tokens=chunk, strict=False):
        require_close(gradients(model, batch()), wanted, 1e-11)


def test_a_model_is_as_before_when_chunks_end() -> None:
    model = tiny.llama().double()
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    wanted = gradients(copy.deepcopy(model), batch())
    enabled = enable(model, chunk_tokens=13)
    enabled.disable()
    enabled.disable()
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation != "core_fpdt"
    require_close(gradients(model, batch()), wanted, 0.0)


def test_evaluation_is_in_chunks_too() -> None:
    model = tiny.mistral().double()
    inputs = batch()
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
    lengths: list[int] = []
    with enable(model, chunk_tokens=13, strict=False):
        hook = model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _, args: lengths.append(args[0].shape[1])
        )
        with torch.no_grad():
            found = model(**inputs, use_cache=False).logits
        hook.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-10)
    assert max(lengths) <= 13
    assert not model.model.layers[0].training


def test_generation_goes_on_as_before() -> None:
    model = tiny.llama()
    prompt = tiny.batch(rows=1, length=20)["input_ids"]
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with enable(model, chunk_tokens=8):
        assert model.generate(prompt, max_new_tokens=8, do_sample=False).equal(wanted)


def test_a_mask_that_the_user_made_is_heeded() -> None:
    model = tiny.llama().double()
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[..., 20:, 5:15] = False
    inputs = {**batch(), "attention_mask": mask.expand(2, 1, -1, -1)}
    wanted = gradients(copy.deepcopy(model), inputs)
    with enable(model, chunk_tokens=13, strict=False):
        require_close(gradients(model, inputs), wanted, 1e-11)


def test_rows_of_a_batch_can_be_packed() -> None:
    model = tiny.llama().double()
    ids = batch()["input_ids"]
    places = torch.cat([torch.arange(1), torch.arange(19), torch.arange(LENGTH - 20)])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": places.expand(2, -1)}
    wanted = gradients(copy.deepcopy(model), inputs)
    with enable(model, chunk_tokens=13, strict=False):
        require_close(gradients(model, inputs), wanted, 1e-11)


def test_chunks_that_will_not_fit_are_refused_after_the_first_one() -> None:
    model = tiny.llama()
    with enable(model, chunk_tokens=13, strict=False, delay=1e-4, host_memory=6e-5) as enabled:
        with pytest.raises(CoreError, match=r"53 tokens needs .* the longest one that fits has"):
            gradients(model, batch())
        assert enabled.runner.store.used() == 0
    with enable(model, chunk_tokens=13, strict=False, delay=1e-4, host_memory=1.0):
        gradients(model, batch())


@pytest.mark.parametrize("order", ["query", "key"])
def test_less_is_kept_where_there_is_less_room(
    order: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama().double()
    wanted = gradients(copy.deepcopy(model), batch())
    settings = {"chunk_tokens": 13, "order": order, "delay": 1e-5, "strict": False}
    with enable(model, host_memory=1.0, **settings) as enabled:
        gradients(model, batch())
        most = enabled.runner.store.counters.peak
    less = 0.9 * most / 2**30
    with (
        caplog.at_level("WARNING", logger="core"),
        enable(model, host_memory=less, **settings) as enabled,
    ):
        require_close(gradients(model, batch()), wanted, 1e-11)
        assert enabled.runner.store.counters.peak < most
    assert "has room for the attention outputs of the last" in caplog.text
