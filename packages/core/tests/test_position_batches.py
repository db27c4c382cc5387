"""Policies that decide by the prompt: they meet the right batch, the whole prompt, and its mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

from core.attention import _registered, register_attention, use_attention
from core.errors import ModelError
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.positions.tokens import RequestState, Tokens
from core.softmax import attend
from core.testing import tiny

WINDOW = 6


class Deciding:
    """Divides positions by what a prompt's last query says, layer by layer."""

    name = "deciding"
    atomic_prefill = True

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def digest(self) -> str:
        return ""

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        self.seen.append(visible.sum(-1).tolist())
        for request, row in zip(requests, query, strict=True):
            request.kept[module.layer_idx] = 1 + row.mean().sigmoid()

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        kept = [request.kept[module.layer_idx] for request in tokens.requests]
        return tokens.rotate(module, x, tokens.positions / torch.stack(kept).unsqueeze(1))


def gradients(batches: Sequence[dict[str, Tensor]], **checkpointing: Any) -> dict[str, Tensor]:
    """Of the sum of their losses: all forward passes come before the one backward pass."""
    model: Any = tiny.llama().train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    with positions(model, Deciding(), verify=False):
        loss = sum(model(**batch, use_cache=False).loss for batch in batches)
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("rows", [2, 3])
def test_a_replay_meets_its_own_batch(rows: int) -> None:
    batches = [tiny.batch(0, rows=2, length=20), tiny.batch(1, rows=rows, length=20)]
    wanted, found = gradients(batches), gradients(batches, use_reentrant=False)
    torch.testing.assert_close(found, wanted)


def in_chunks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    output, _ = attend(query, key, value, scale=kwargs["scaling"])
    return output.transpose(1, 2), None


class Chunked(nn.Module):
    """Runs a layer in two pieces."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, position_embeddings: Any, **kwargs: Any) -> Tensor:
        pieces = []
        for part in (slice(0, 4), slice(4, None)):
            tables = tuple(table[:, part] for table in position_embeddings)
            given = {**kwargs, "position_ids": kwargs["position_ids"][:, part]}
            given |= {"attention_mask": None, "position_embeddings": tables}
            pieces.append(self.layer(hidden[:, part], **given))
        return torch.cat(pieces, dim=1)


def test_a_prompt_in_pieces_is_refused_where_it_must_be_whole() -> None:
    model: Any = tiny.llama()
    ids = tiny.batch(rows=1, length=9)["input_ids"]
    with positions(model, Deciding()):
        model(ids)
        model.model.layers[1] = Chunked(model.model.layers[1])
        with pytest.raises(ModelError, match=r"'deciding'.*4 of 9 tokens") as caught:
            model(ids, use_cache=False)
    assert "LlamaAttention" in str(caught.value)
    with positions(model, ModelPositions(), verify=False):
        model(ids, use_cache=False)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_a_whole_prompt_passes(options: dict[str, Any]) -> None:
    model: Any = tiny.llama()
    with positions(model, Deciding()):
        made = model.generate(**tiny.left_padded(), max_new_tokens=4, do_sample=False, **options)
    assert made.shape == (2, 18)


class Lazy:
    """A mask that is no tensor, and says nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Readable(Lazy):
    """One that tells of three keys."""

    def row(self, rows: Tensor, last: Tensor) -> Tensor:
        steps = torch.arange(14)
        return (steps > last.unsqueeze(1) - 3).expand(len(rows), -1)


def lazily(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return in_chunks(module, query, key, value, None, **kwargs)


def readably(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return lazily(*args, **kwargs)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Register functions with masks that are no tensors, and leave the registries as they were."""
    register_attention("core_lazy", lazily, Lazy)
    register_attention("core_readable", readably, Readable)
    yield
    for name in ("core_lazy", "core_readable"):
        for table in (type(FUNCTIONS)._global_mapping, type(MASKS)._global_mapping, _registered):
            del table[name]


def seen_in(model: Any, name: str = "") -> list[list[int]]:
    policy = Deciding()
    inputs = tiny.left_padded()
    if not name:
        with positions(model, policy, verify=False):
            model(**inputs, use_cache=False)
    else:
        with use_attention(model, name), positions(model, policy, verify=False):
            model(**inputs, use_cache=False)
    return policy.seen


@pytest.mark.parametrize("family", ["Mistral", "Phi3"])
def test_a_window_is_seen_without_a_mask_of_numbers(family: str) -> None:
    model = tiny.build(family, sliding_window=WINDOW)
    assert seen_in(model) == [[6, 6]] * 3
    assert seen_in(model, "core_lazy") == [[6, 6]] * 3
    assert seen_in(model, "core_readable") == [[3, 3]] * 3


def test_padding_is_seen_without_a_mask_of_numbers() -> None:
    model = tiny.llama()
    assert seen_in(model) == seen_in(model, "core_lazy") == [[14, 9]] * 3


def test_a_mask_that_cannot_be_read_is_refused() -> None:
    model: Any = tiny.llama()
    # As of a family that sees its keys in blocks.
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"chunked_attention.*Lazy"):
        seen_in(model, "core_lazy")
    assert len(seen_in(model, "core_readable")) == 3
    with use_attention(model, "core_lazy"), positions(model, ModelPositions(), verify=False):
        model(**tiny.left_padded(), use_cache=False)
