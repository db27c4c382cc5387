"""Models whose positions cannot be replaced are refused with the reason, and left alone."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

from core.attention import _registered, register_attention, use_attention
from core.errors import ModelError
from core.positions.install import positions, unrotated
from core.positions.policy import ModelPositions
from core.testing.tiny import build as build_family, left_padded as prompts

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def build(family: str, **changes: Any) -> Any:
    return build_family(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("GPT2", {}, "learned"),
        ("OPT", {}, "learned"),
        ("Bloom", {}, "ALiBi"),
        ("Mpt", {}, "ALiBi"),
        ("GPTJ", {}, "no rotary"),
        ("GptOss", {}, "sinks"),
        ("Cohere2", {"sliding_window": 6, "layer_types": MIXED}, "layer 1"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 1]}, "layer 1"),
        ("DeepseekV3", {}, "layer 0"),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    model = build(family, **changes)
    modules = [id(module) for module in model.modules()]
    with pytest.raises(ModelError, match=reason) as caught, positions(model, ModelPositions()):
        pass
    assert type(model).__name__ in str(caught.value)
    assert [id(module) for module in model.modules()] == modules
    assert model.config._attn_implementation != "core_positions"


def test_mrope_is_refused() -> None:
    config = transformers.Qwen2VLTextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )
    model = transformers.Qwen2VLTextModel(config)
    with pytest.raises(ModelError, match="mrope"), positions(model, ModelPositions()):
        pass


def test_caches_do_not_cross_the_border() -> None:
    model = build("Llama")
    ids = prompts()["input_ids"][:1]
    cache = model(ids, use_cache=True).past_key_values
    with positions(model, ModelPositions()), pytest.raises(ModelError, match="cache"):
        model(ids[:, :1], past_key_values=cache)


def test_two_policies_and_switching_by_hand_are_refused() -> None:
    model = build("Llama")
    with positions(model, ModelPositions()):
        with pytest.raises(ModelError, match="already"), positions(model, ModelPositions()):
            pass
        model.set_attn_implementation("sdpa")
        with pytest.raises(ModelError, match="does not heed"):
            model(**prompts())


def deaf(*args: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(*args, **kwargs)


def test_unrotated_keys_need_an_attention_that_rotates() -> None:
    model = build("Llama")
    with unrotated(model), pytest.raises(ModelError, match=r"'sdpa' does not rotate"):
        model(**prompts())
    tables = (type(FUNCTIONS)._global_mapping, type(MASKS)._global_mapping, _registered)
    try:
        for name, rotates in (("core_deaf", False), ("core_rotates", True)):
            register_attention(name, deaf, sdpa_mask, rotates=rotates)
        with unrotated(model), use_attention(model, "core_rotates"):
            model(**prompts())
        refused = pytest.raises(ModelError, match="'core_deaf' does not rotate")
        with unrotated(model), use_attention(model, "core_deaf"), refused:
            model(**prompts())
    finally:
        for table in tables:
            for name in ("core_deaf", "core_rotates"):
                table.pop(name, None)
    model(**prompts())


def test_unrotated_does_not_nest() -> None:
    model = build("Llama")
    with positions(model, ModelPositions()):
        with pytest.raises(ModelError, match="already"), unrotated(model):
            pass
        model(**prompts())
    with unrotated(model):
        with pytest.raises(ModelError, match="already"), unrotated(model):
            pass
        with pytest.raises(ModelError, match="already"), positions(model, ModelPositions()):
            pass
