"""Replacing attention: both registries, a real switch, and a proof; or an error and no change."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.attention import (
    AttentionSwitch,
    _registered,
    attention,
    register_attention,
    switch_attention,
    use_attention,
)
from core.contributions import MODEL, Phase
from core.errors import ModelError, PluginError
from core.plan import Plan
from core.plugins import Contributed
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.positions.tokens import Tokens
from core.softmax import attend
from core.testing.tiny import build as build_family


def build(family: str = "Llama", **changes: Any) -> Any:
    return build_family(family, **changes)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """The registries are global: leave them as they were."""
    tables = [
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping,
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping,
        _registered,
    ]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def dense_mask(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def deaf_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    """Forgets the padding."""
    return dense_mask(*args, attention_mask=None, **kwargs)


def no_window_mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> Any:
    """Forgets the window."""
    return dense_mask(*args, **kwargs)


def exact(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output, _ = attend(query, key, value, mask=mask, scale=kwargs["scaling"])
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def wrong_scale(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return exact(*args, **{**kwargs, "scaling": 1.05 * kwargs["scaling"]})


def failing(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise RuntimeError("no such kernel")


def apply(model: Any, forward: Any = exact, mask: Any = dense_mask, **options: Any) -> Any:
    transform = attention("core_test", forward, mask, **options)
    return transform.apply(model, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Phi3", {"sliding_window": 6}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 6}),
        ("GPTNeoX", {}),
    ],
)
def test_an_exact_function_is_accepted_and_used(family: str, changes: dict[str, Any]) -> None:
    model = build(family, **changes)
    tokens = torch.randint(1, 96, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    text = model.generate(tokens, **options)
    assert apply(model) is model
    assert model.config._attn_implementation == "core_test"
    assert torch.equal(model.generate(tokens, **options), text)


def test_gpt2_with_learned_positions() -> None:
    model = build("GPT2")
    assert apply(model).config._attn_implementation == "core_test"


@pytest.mark.parametrize(
    ("family", "changes", "forward", "mask", "reason"),
    [
        ("Llama", {}, wrong_scale, dense_mask, r"layer 0 \(LlamaDecoderLayer\)"),
        ("Llama", {}, exact, deaf_mask, "layer 0"),
        ("Mistral", {"sliding_window": 6}, exact, no_window_mask, "layer 0"),
        ("Llama", {}, failing, dense_mask, "no such kernel"),
        ("Bloom", {}, exact, dense_mask, "BloomModel does not use"),
        ("Falcon", {}, exact, dense_mask, "FalconModel does not use"),
        ("Mpt", {}, exact, dense_mask, "MptModel does not use"),
        ("CodeGen", {}, exact, dense_mask, "CodeGenModel does not use"),
    ],
)
def test_refused_models_are_left_as_they_were(
    family: str, changes: dict[str, Any], forward: Any, mask: Any, reason: str
) -> None:
    model = build(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason) as caught:
        apply(model, forward, mask)
    assert f"{family}ForCausalLM" in str(caught.value)
    assert model.config._attn_implementation == before


def test_a_model_that_pretends_to_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Bloom")
    monkeypatch.setattr(type(model.transformer), "_can_set_attn_implementation", lambda *_: True)
    with pytest.raises(ModelError, match=r"ignores .*'core_test'.*layer 0 \(BloomBlock\)"):
        apply(model)


def test_tolerance_and_verification_can_be_chosen() -> None:
    apply(build(), wrong_scale, tolerance=1.0)
    model = apply(build(), wrong_scale, verify=False)
    assert model.config._attn_implementation == "core_test"


def test_only_the_text_decoder_is_switched() -> None:
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "model_type": "llama",
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "clip_vision_model",
    }
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    undo = switch_attention(model, register("core_test"))
    assert model.config.text_config._attn_implementation == "core_test"
    assert model.config.vision_config._attn_implementation == "sdpa"
    undo()
    assert model.config.text_config._attn_implementation == "sdpa"


def register(name: str) -> str:
    register_attention(name, exact, dense_mask)
    return name


def test_registering_twice_is_fine_and_another_function_is_not() -> None:
    register("core_test")
    register("core_test")
    with pytest.raises(PluginError, match="core_test"):
        register_attention("core_test", wrong_scale, dense_mask)
    with pytest.raises(PluginError, match="core_test"):
        register_attention("core_test", exact, deaf_mask)
    assert ALL_MASK_ATTENTION_FUNCTIONS["core_test"] is dense_mask


def test_names_of_others_are_never_overwritten() -> None:
    transformers.AttentionInterface.register("stranger", exact)
    with pytest.raises(PluginError, match="taken"):
        register("stranger")
    assert ALL_ATTENTION_FUNCTIONS["stranger"] is exact
    register("core_test")
    transformers.AttentionInterface.register("core_test", failing)
    with pytest.raises(PluginError, match="taken"):
        register("core_test")


@pytest.mark.parametrize(
    "name", ["sdpa", "eager", "flash_attention_2", "core_flash", "core_sdpa2", "a/b", "paged|x", ""]
)
def test_names_that_transformers_reads_otherwise_are_refused(name: str) -> None:
    with pytest.raises(PluginError):
        attention(name, exact, dense_mask)
    with pytest.raises(PluginError):
        register(name)


def test_use_is_undone_after_an_exception() -> None:
    model = build()
    with suppress(KeyError), use_attention(model, register("core_test")):
        assert model.config._attn_implementation == "core_test"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="nobody"):
        switch_attention(model, "nobody")


def test_a_switch_goes_over_and_back_as_often_as_wanted() -> None:
    model = build()
    switch = AttentionSwitch(model, register("core_test"))
    for current in ("sdpa", "eager"):
        model.set_attn_implementation(current)
        for _ in range(2):
            with suppress(KeyError), switch:
                assert model.config._attn_implementation == "core_test"
                raise KeyError
            assert model.config._attn_implementation == current
    with pytest.raises(ModelError, match="BloomModel"):
        AttentionSwitch(build("Bloom"), "core_test")


def test_the_transform_pickles_and_fits_a_plan() -> None:
    transform = pickle.loads(pickle.dumps(attention("core_test", exact, dense_mask)))
    assert (transform.phase, transform.claims) == (Phase.KERNEL, {"attention"})
    plan = Plan.build([Contributed("demo", transform)])
    model = plan.apply(MODEL, build(), None)  # type: ignore[arg-type]
    assert model.config._attn_implementation == "core_test"
    # The copy registers the same functions again.
    attention("core_test", exact, dense_mask).apply(build(), None)  # type: ignore[arg-type]


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="no transformers model"):
        apply(nn.Linear(2, 2))


class Halved(ModelPositions):
    """Half of every position."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        return tokens.rotate(module, x, tokens.positions / 2)


@pytest.mark.parametrize("first", ["attention", "positions"])
def test_attention_heeds_the_positions_in_force(first: str) -> None:
    tokens = torch.randint(1, 96, (2, 9))
    plain = build()
    with positions(plain, Halved()):
        wanted = plain.generate(tokens, max_new_tokens=6, do_sample=False)
    model = build()
    if first == "attention":
        apply(model)
    with positions(model, Halved()):
        if first == "positions":
            apply(model)
        assert model.config._attn_implementation == "core_test"
        found = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted)


def test_a_function_that_rotates_itself_gets_unrotated_keys() -> None:
    model = build()
    register_attention("core_own", wrong_scale, dense_mask, rotates=True)
    assert ALL_ATTENTION_FUNCTIONS["core_own"] is wrong_scale
    with positions(model, Halved()), pytest.raises(ModelError, match="layer 0"):
        # It does not rotate, though it says so: the probe finds out.
        apply(model, exact, rotates=True)
