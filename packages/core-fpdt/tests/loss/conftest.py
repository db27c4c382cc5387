from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.testing import tiny
from core_fpdt.loss.head import replace_head
from core_fpdt.settings import FPDTSettings

# What each family does to its logits, or how it makes them, is what it stands for here.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Llama": {},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "GPT2": {
        "tie_word_embeddings": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "loss_type": "ForCausalLM",
    },
    "Phi": {"embd_pdrop": 0.0, "resid_pdrop": 0.0},  # a head with a bias
    "Qwen3Moe": {
        "experts_implementation": "eager",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
SMALL = 16 * 1024
"""Bytes for logits: 10 tokens of a tiny model at a time, of which a batch has 48."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are too small here for more than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Build a model of a family, in training."""

    def build(family: str = "Llama", **changes: Any) -> nn.Module:
        return tiny.build(family, **{**FAMILIES[family], **changes}).train()

    return build


@pytest.fixture
def lazy() -> Callable[..., Callable[[], None]]:
    """Replace the head of a model by one that computes few logits at a time."""

    def lazy(model: nn.Module, limit: int = SMALL) -> Callable[[], None]:
        return replace_head(model, FPDTSettings(loss_chunk_bytes=limit))

    return lazy


@pytest.fixture
def gradients() -> Callable[..., dict[str, Tensor]]:
    """The loss that a function computes, and the gradients of a model's parameters."""

    def gradients(model: nn.Module, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        loss = compute()
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"loss": loss.detach(), **found}

    return gradients


@pytest.fixture
def require_close() -> Callable[..., None]:
    """Compare named tensors, relative to the largest value of each."""

    def require(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            off = (found[name].double() - tensor.double()).abs().max()
            limit = tolerance * tensor.double().abs().max().clamp_min(1e-9)
            assert off <= limit, f"{name} is off by {off:.3g}"

    return require


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two rows of 24 tokens, of which some are not to be learnt."""
    inputs = tiny.batch()
    inputs["labels"][0, :7] = -100
    inputs["labels"][1, 20:] = -100
    return inputs
