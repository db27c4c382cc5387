"""With a model's own positions nothing changes: text, caches, gradients; all is restored."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.positions.install import positions, unrotated
from core.positions.policy import ModelPositions
from core.positions.tokens import Tokens
from core.testing.tiny import build as build_family, left_padded as prompts

WINDOW = {"sliding_window": 6}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-window": ("Phi3", WINDOW),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", WINDOW),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {}),
    "cohere": ("Cohere", {}),
    "glm4": ("Glm4", {}),
    "gemma3": ("Gemma3Text", {**WINDOW, "layer_types": MIXED}),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 16.0],
    "original_max_position_embeddings": 16,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def build(family: str, **changes: Any) -> Any:
    return build_family(family, **changes)


def generate(model: Any, new: int = 16, **options: Any) -> Tensor:
    given: Tensor = model.generate(**prompts(), max_new_tokens=new, do_sample=False, **options)
    return given[:, 14:]


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    found: Tensor = model(**(inputs or prompts())).logits
    return found


class Halved(ModelPositions):
    """Half of every position."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        return tokens.rotate(module, x, tokens.positions / 2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_own_positions_change_nothing(kind: str) -> None:
    family, changes = KINDS[kind]
    model = build(family, **changes)
    before, text = logits(model), generate(model)
    real = prompts()["attention_mask"].bool()
    with positions(model, ModelPositions()):
        torch.testing.assert_close(logits(model)[real], before[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(model), text)
    assert len(set(text.flatten().tolist())) > 5, "a text of one token proves nothing"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("cache", ["static", None])
def test_other_caches(cache: str | None) -> None:
    model = build("Llama")
    options: dict[str, Any] = {"use_cache": False} if not cache else {"cache_implementation": cache}
    text = generate(model, disable_compile=True, **options)
    with positions(model, ModelPositions()):
        assert torch.equal(generate(model, disable_compile=True, **options), text)


def test_beams_and_interleaved_caches() -> None:
    model = build("Mistral", **WINDOW)
    beams = generate(model, num_beams=3)
    one, two = prompts(8)["input_ids"][:1], prompts(11)["input_ids"][:1]
    wanted = [logits(model, input_ids=ids)[:, -1] for ids in (one, two)]
    with positions(model, ModelPositions()), torch.no_grad():
        assert torch.equal(generate(model, num_beams=3), beams)
        first = model(one[:, :5], use_cache=True).past_key_values
        second = model(two[:, :5], use_cache=True).past_key_values
        found = [
            model(ids[:, 5:], past_key_values=cache).logits[:, -1]
            for ids, cache in ((one, first), (two, second))
        ]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_cropped_cache_continues_where_it_was_cropped() -> None:
    model = build("Llama")
    ids = prompts()["input_ids"][:1]
    wanted = logits(model, input_ids=ids)
    with positions(model, ModelPositions()), torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, :3], past_key_values=cache)
        cache.crop(-3)
        found = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted[:, 4:], atol=1e-5, rtol=1e-5)


def test_longrope_switches_with_the_batch_as_transformers_does() -> None:
    model = build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    text, before = generate(model), logits(model, **prompts(20))
    real = prompts(20)["attention_mask"].bool()
    with positions(model, ModelPositions()):
        assert torch.equal(generate(model), text)
        found = logits(model, **prompts(20))
    torch.testing.assert_close(found[real], before[real], atol=1e-5, rtol=1e-5)


def test_longrope_per_request_does_not_depend_on_neighbours() -> None:
    model = build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    long, short = prompts(24)["input_ids"][:1], prompts(24)["input_ids"][1:, 14:]
    padded = torch.cat([torch.zeros(1, 14, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :14] = 0
    both = {
        "input_ids": torch.cat([long, padded]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }
    alone = logits(model, input_ids=long), logits(model, input_ids=short)
    assert (logits(model, **both)[1, 14:] - alone[1][0]).abs().max() > 0.1
    with positions(model, ModelPositions(per_request=True)):
        found = logits(model, **both)
    torch.testing.assert_close(found[0], alone[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1, 14:], alone[1][0], atol=1e-4, rtol=1e-4)


def test_gradients_and_checkpointing() -> None:
    model = build("Llama").train()
    inputs = prompts()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for again in (False, True):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with positions(model, ModelPositions()):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            logits(model, **prompts(9))  # another pass between forward and backward
            loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_devices_and_dtypes(device: str, dtype: torch.dtype) -> None:
    model = build("Llama").to(device, dtype)
    ids = prompts()["input_ids"][:1].to(device)
    before = logits(model, input_ids=ids)
    with positions(model, ModelPositions()):
        torch.testing.assert_close(logits(model, input_ids=ids), before)


def test_a_model_that_moves_takes_its_rotation_along() -> None:
    model, wanted = build("Llama"), build("Llama").double()
    with positions(model, Halved()), positions(wanted, Halved()):
        torch.testing.assert_close(logits(model.double()), logits(wanted))


def test_everything_is_restored_after_an_exception() -> None:
    model = build("Llama")
    rotary, before = model.model.rotary_emb, logits(model)
    keys = list(model.state_dict())
    with suppress(KeyError), positions(model, Halved()):
        assert list(model.state_dict()) == keys
        raise KeyError
    assert model.model.rotary_emb is rotary
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("rotation" in name for m in model.modules() for name in vars(m))


def test_a_copy_of_the_model_keeps_its_policy() -> None:
    model = build("Llama")
    with positions(model, Halved()):
        wanted = logits(model)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert (logits(model) - wanted).abs().max() > 0.1
    for one in copies:
        torch.testing.assert_close(logits(one), wanted)


def test_unrotated_gives_the_models_own_rotation() -> None:
    model = build("Llama")
    own = model.model.rotary_emb
    with unrotated(model) as rotary:
        cos, sin = model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
        assert rotary.embedding is own
    assert model.model.rotary_emb is own
    assert (cos == 1).all()
    assert (sin == 0).all()
    assert cos.shape == (1, 3, 8)
