"""What users do between, before and beside the passes of an enabled model."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.testing import tiny
from core_fpdt import enable

CHUNK = 7


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bar: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        assert off <= bar, f"{name} differs by {off:.3g}"


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**{**tiny.batch(length=20), "attention_mask": None, **inputs}).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_mask_of_the_user_in_any_place(family: str) -> None:
    """GPT-2 hands masks to its layers by position."""
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "GPT2" else {}
    model = tiny.build(family, **changes).double().train()
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 12:, 3:6] = False
    wanted = step(copy.deepcopy(model), attention_mask=mask, use_cache=False)
    with enable(model, chunk_tokens=CHUNK, strict=False):
        require_close(step(model, attention_mask=mask, use_cache=False), wanted)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_cache_that_nobody_asked_for(family: str) -> None:
    """``use_cache`` is the default of configurations, in training too."""
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "GPT2" else {}
    model = tiny.build(family, **changes).double().train()
    wanted = step(copy.deepcopy(model))
    prompt = tiny.batch(rows=1, length=12)["input_ids"]
    expected = copy.deepcopy(model).eval().generate(prompt, max_new_tokens=6, do_sample=False)
    with enable(model, chunk_tokens=CHUNK, strict=False):
        require_close(step(model), wanted)
        assert model.generate(prompt, max_new_tokens=6, do_sample=False).equal(expected)
        assert model.model.layers[0].training if family == "Llama" else True
        require_close(step(model), wanted)
        model.eval()
        assert model.generate(prompt, max_new_tokens=6, do_sample=False).equal(expected)


def test_a_filled_cache_is_refused_in_training() -> None:
    model = tiny.llama()
    with torch.no_grad():
        cache = model(tiny.batch(length=5)["input_ids"], use_cache=True).past_key_values
    with enable(model, chunk_tokens=CHUNK, strict=False):
        model.train()
        with pytest.raises(ModelError, match="go on after a cache"):
            model(**tiny.batch(length=9), past_key_values=cache)


def test_the_mode_may_change_before_the_backward_pass() -> None:
    model = tiny.build("OPT", dropout=0.3).double().train()
    inputs = {**tiny.batch(length=20), "use_cache": False}
    with enable(model, chunk_tokens=CHUNK, strict=False):
        found = []
        for switch in (False, True):
            torch.manual_seed(0)
            model.train().zero_grad()
            loss = model(**inputs).loss
            model.train(not switch)
            loss.backward()
            found.append(gradients(model))
    require_close(found[1], found[0], 0.0)


def test_weights_that_were_changed_before_the_backward_pass() -> None:
    model = tiny.llama().train()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        loss = model(**tiny.batch(length=20), use_cache=False).loss
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(2)
        with pytest.raises(ModelError, match="weights were changed after the forward pass"):
            loss.backward()


def test_threads_have_passes_of_their_own() -> None:
    model = tiny.llama().double().eval()
    inputs = {**tiny.batch(length=20), "use_cache": False}
    with torch.no_grad():
        wanted = model(**inputs).logits
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(model(**inputs).logits for _ in range(3))

    with enable(model, chunk_tokens=CHUNK, strict=False):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 9
    for logits in found:
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)


def test_an_interrupt_while_evaluating_leaves_modes_alone() -> None:
    model = tiny.llama()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(**tiny.batch(length=20), use_cache=False)
        handle.remove()
        assert not any(layer.training for layer in model.model.layers)
        model.train()
        model(**tiny.batch(length=20), use_cache=False).loss.backward()
        assert all(layer.training for layer in model.model.layers)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kept", [{"order": "key"}, {"keep_keys": False}], ids=str)
def test_sums_are_not_cast_by_autocast(kept: dict[str, Any]) -> None:
    """A softcap makes kernels compute with products of PyTorch, which autocast would round."""
    model = tiny.build("Gemma2", head_dim=8, attn_logit_softcapping=20.0, sliding_window=16)
    inputs = {**tiny.batch(length=20), "use_cache": False}
    with enable(model, chunk_tokens=CHUNK, strict=False, **kept):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs).loss.backward()
        inside = gradients(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
    require_close(inside, gradients(model), 1e-6)


def test_a_decoder_whose_mask_is_made_outside_of_it() -> None:
    import transformers

    text = {
        "model_type": "gemma",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vocab_size": 96,
    }
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_token_id=95, hidden_size=32
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).double().train()
    ids = torch.randint(1, 90, (1, 30))
    ids[:, :4] = 95
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64),
        "token_type_ids": (torch.arange(30) > 10).long()[None],
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
    }
    wanted = step(copy.deepcopy(model), **inputs)
    with enable(model, chunk_tokens=CHUNK, strict=False):
        require_close(step(model, **inputs), wanted, 1e-6)
