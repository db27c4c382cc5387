"""Tiny decoders built from configurations: real architectures in a few milliseconds.

Their weights are far larger than transformers would draw them, so that greedy decoding visits many
different tokens and every mistake shows in the logits. Embeddings are not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

VOCABULARY = 128
"""Number of token ids of every tiny model."""

SPREAD = 0.25
"""Standard deviation of every weight matrix."""

_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny Llama; ``overrides`` are configuration fields.

    Example:
        >>> model = llama(num_hidden_layers=1)
        >>> model.config.vocab_size
        128
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig, seed, overrides)


def phi3(seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny Phi-3, with fused projections of queries, keys and values."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return _build(Phi3ForCausalLM, Phi3Config, seed, overrides)


def qwen3(seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny Qwen 3, with normalized queries and keys and a head size of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, Qwen3Config, seed, {"head_dim": 32, **overrides})


def mistral(seed: int = 0, **overrides: Any) -> nn.Module:
    """Build a tiny Mistral with a sliding window of 16 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    return _build(MistralForCausalLM, MistralConfig, seed, {"sliding_window": 16, **overrides})


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "phi3": phi3,
    "qwen3": qwen3,
    "mistral": mistral,
}
"""The tiny models by name."""


def prompts(count: int = 3, seed: int = 0) -> list[list[int]]:
    """Random prompts of different lengths, longer than Mistral's window the last one."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [5 + 7 * index for index in range(count)]
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batch(seed: int = 0, rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    """One batch of random token ids with their labels and mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _build(model: Any, config: Any, seed: int, overrides: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: nn.Module = model(config(**{**_SHAPE, **overrides}))
    return built.eval()
