"""What layers hand to an attention function: honoured, without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

from core.attention import _registered, refuse_unknown, register_attention, use_attention
from core.errors import ModelError
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.positions.tokens import Tokens
from core.testing import tiny

HONOURED = frozenset({"scaling", "sliding_window"})
FAMILIES = ["Llama", "Phi3", "Qwen3", "Mistral", "GPTNeoX", "GPT2", "Gemma3Text", "Mixtral"]


def strict(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    assert "core_batch" not in kwargs
    refuse_unknown(module, kwargs, HONOURED)
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, **kwargs
    )
    return result


@pytest.fixture
def name() -> Iterator[str]:
    """Register the strict function for one test."""
    register_attention("core_strict", strict, sdpa_mask)
    yield "core_strict"
    for table in (type(FUNCTIONS)._global_mapping, type(MASKS)._global_mapping, _registered):
        del table["core_strict"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arguments_of_known_families_pass(family: str, name: str) -> None:
    model: Any = tiny.build(family, attn_pdrop=0.0)
    batch = tiny.batch()
    with use_attention(model, name):
        model(**batch, use_cache=False, output_hidden_states=True)
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        model.train()(**batch).loss.backward()
        if family != "GPT2":
            with positions(model, ModelPositions()):
                model(**batch)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("GptOss", {}, r"GptOssAttention.*'s_aux'.*sinks"),
        ("Gemma2", {"head_dim": 8}, r"Gemma2Attention.*'softcap'.*capped"),
        ("Llama", {"attention_dropout": 0.5}, r"LlamaAttention.*'dropout'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str, name: str
) -> None:
    model = tiny.build(family, **changes).train()
    with use_attention(model, name), pytest.raises(ModelError, match=message):
        model(**tiny.batch())


def test_cores_own_attention_refuses_capped_scores() -> None:
    model: Any = tiny.llama()
    with positions(model, ModelPositions()):
        with pytest.raises(ModelError, match=r"LlamaAttention.*'softcap'"):
            model(**tiny.batch(), softcap=30.0)
        with pytest.raises(ModelError, match=r"LlamaAttention.*'a_bias'"):
            model(**tiny.batch(), a_bias=torch.zeros(3))


class ByQueryHead(ModelPositions):
    """Gives every query head a key of its own."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        batch, length = tokens.positions.shape
        at = tokens.positions.unsqueeze(1).expand(batch, 4, length)
        return tokens.rotate(module, x, at)


def test_the_layer_is_named_under_a_policy_by_head() -> None:
    model: Any = tiny.llama()
    with positions(model, ByQueryHead()), pytest.raises(ModelError, match="LlamaAttention"):
        model(**tiny.batch(), softcap=30.0)


def test_a_replay_after_the_policy_is_refused(name: str) -> None:
    model: Any = tiny.llama()
    given: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)

    with use_attention(model, name):
        layer = model.model.layers[0]
        with positions(model, ModelPositions()), torch.no_grad():
            layer.register_forward_pre_hook(keep, with_kwargs=True)
            model(**tiny.batch(), use_cache=False)
        with pytest.raises(ModelError, match="no longer in force"):
            layer(torch.zeros(2, 24, 32), **given)
