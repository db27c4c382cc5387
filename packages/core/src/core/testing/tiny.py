"""Tiny models of any family that transformers knows: real architectures in a few milliseconds.

Their weights are far larger than transformers would draw them, so that greedy decoding visits many
different tokens and every mistake shows in the logits. Embeddings are not tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

SPREAD = 0.25
"""Standard deviation of every weight matrix: a text of one repeated token proves nothing."""

VOCABULARY = 96
"""Number of token ids of every tiny model."""

_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# What a family needs besides, or says in words of its own.
_NEEDS: Mapping[str, Mapping[str, Any]] = {
    "CodeGen": {"rotary_dim": 4},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 3,
    },
    "GPTJ": {"rotary_dim": 4},
    "GPTNeoX": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "Gemma3Text": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
    "GptOss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "Qwen3": {"head_dim": 8},
    "T5": {"num_layers": 3, "d_kv": 8, "num_heads": 4, "d_model": 32},
}
_LONGROPE: Mapping[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 16.0],
    "original_max_position_embeddings": 16,
}
_HEADS = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration"}


def build(family: str, head: str = "", seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny model in evaluation mode; random state is left as it was.

    Args:
        family: prefix of the configuration class, such as ``"Llama"`` or ``"GPTNeoX"``.
        head: suffix of the model class; the language model by default, ``"Model"`` without head.
        seed: seed of the weights.
        changes: configuration fields.

    Example:
        >>> type(build("Phi3", num_hidden_layers=1)).__name__
        'Phi3ForCausalLM'
    """
    import transformers

    fields = {**_SHAPE, **_NEEDS.get(family, {}), **changes}
    config = getattr(transformers, f"{family}Config")(**fields)
    kind = f"{family.removesuffix('Text')}{head or _HEADS.get(family, 'ForCausalLM')}"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=SPREAD)
    return model.eval()


def left_padded(length: int = 14, padding: int = 5) -> dict[str, torch.Tensor]:
    """Make two rows of token ids, the second padded on the left, with their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny Llama; ``changes`` are configuration fields."""
    return build("Llama", seed=seed, **changes)


def phi3(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny Phi-3, with fused projections of queries, keys and values."""
    return build("Phi3", seed=seed, **changes)


def qwen3(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny Qwen 3, with normalized queries and keys."""
    return build("Qwen3", seed=seed, **changes)


def mistral(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny Mistral with a sliding window of 16 tokens."""
    changes.setdefault("sliding_window", 16)
    return build("Mistral", seed=seed, **changes)


def longrope(seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny Phi-3 whose rotary frequencies change beyond 16 tokens (longrope)."""
    changes.setdefault("original_max_position_embeddings", 16)
    changes.setdefault("rope_parameters", dict(_LONGROPE))
    return build("Phi3", seed=seed, **changes)


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "phi3": phi3,
    "qwen3": qwen3,
    "mistral": mistral,
    "longrope": longrope,
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
