"""Families that would compute something else in chunks are refused by layer and reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import core_fpdt
from core.errors import ModelError
from core.testing.tiny import batch, build

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_d_state": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
STATE = {"state_size": 4, "expand": 2, "conv_kernel": 4}
GEMMA = {
    "head_dim": 8,
    "sliding_window": 9,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}

RECURRENT = "computes something else in chunks"
OWN_ATTENTION = "does not use transformers' AttentionInterface"
REFUSED: Mapping[str, tuple[str, Mapping[str, Any], str, str]] = {
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}, "BambaDecoderLayer", RECURRENT),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "BloomModel", OWN_ATTENTION),
    "diffllama": ("DiffLlama", {}, "DiffLlamaDecoderLayer", "attends more than once"),
    "doge": ("Doge", {"num_experts": 4}, "DogeDecoderLayer", "reads its mask by itself"),
    "falcon_h1": (
        "FalconH1",
        {**MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
        "FalconH1DecoderLayer",
        RECURRENT,
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
            "altup_num_inputs": 2,
        },
        "Gemma3nTextDecoderLayer",
        "takes no (batch, tokens, width)",
    ),
    "gemma4 with shared keys": (
        "Gemma4Text",
        {
            **GEMMA,
            "global_head_dim": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "Gemma4TextDecoderLayer",
        "reads its mask by itself",
    ),
    "gpt_j": ("GPTJ", {}, "GPTJModel", OWN_ATTENTION),
    "jamba": (
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "JambaMambaDecoderLayer",
        RECURRENT,
    ),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_ff_dim": 48,
            "block_auto_adjust_ff_dim": False,
        },
        "Lfm2DecoderLayer",
        RECURRENT,
    ),
    "mamba": ("Mamba", {**STATE, "time_step_rank": 4}, "MambaBlock", RECURRENT),
    "mamba2": (
        "Mamba2",
        {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        "Mamba2Block",
        RECURRENT,
    ),
    "minimax": (
        "MiniMax",
        {
            **MIXTURE,
            "head_dim": 8,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "MiniMaxDecoderLayer",
        RECURRENT,
    ),
    "mpt": ("Mpt", {"n_layers": 2}, "MptModel", OWN_ATTENTION),
    "olmo_hybrid": ("OlmoHybrid", LINEAR, "OlmoHybridLinearAttentionDecoderLayer", RECURRENT),
    "phimoe": ("Phimoe", MIXTURE, "PhimoeDecoderLayer", "draws random numbers"),
    "qwen3_5": ("Qwen3_5Text", {**LINEAR, "head_dim": 8}, "Qwen3_5DecoderLayer", RECURRENT),
    "qwen3_next": (
        "Qwen3Next",
        {
            **LINEAR,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "Qwen3NextDecoderLayer",
        RECURRENT,
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "block_types": ["recurrent", "attention"],
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 9,
        },
        "RecurrentGemmaDecoderLayer",
        RECURRENT,
    ),
    "xglm": (
        "XGLM",
        {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        "XGLMModel",
        OWN_ATTENTION,
    ),
    "dropout of attention": ("SeedOss", {"attention_dropout": 0.1}, "SeedOssAttention", "dropout"),
    "router losses": (
        "Mixtral",
        {**MIXTURE, "output_router_logits": True},
        "MixtralForCausalLM",
        "output_router_logits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_layer_and_reason_and_left_as_it_was(name: str) -> None:
    family, changes, layer, reason = REFUSED[name]
    model = build(family, **{"num_hidden_layers": 2, **changes})
    inputs = batch(length=40)
    before = model(**inputs).loss
    with pytest.raises(ModelError) as refused:
        core_fpdt.enable(model, chunk_tokens=16)
    assert layer in str(refused.value)
    assert reason in str(refused.value)
    assert not model.training
    assert torch.equal(model(**inputs).loss, before)
