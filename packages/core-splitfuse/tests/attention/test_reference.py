"""The reference itself, held against torch's attention and that of transformers' models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import LlamaConfig, modeling_llama

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.reference import paged_attention_reference

LENGTH, HEADS, GROUP, DIM = 21, 4, 2, 16
TABLES = torch.tensor([[2, 0, 1], [4, 3, 0]])
STARTS = torch.tensor([0, 5, 8])
LENGTHS = torch.tensor([LENGTH, 9])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in float64; blocks of eight tokens."""
    shapes = (8, HEADS, DIM), (5, 8, HEADS // GROUP, DIM), (5, 8, HEADS // GROUP, DIM)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def dense(store: Tensor, sequence: int) -> Tensor:
    """(1, Hkv, L, D) as models have them."""
    blocks = TABLES[sequence]
    return store[blocks].flatten(0, 1)[: LENGTHS[sequence]].transpose(0, 1).unsqueeze(0)


def mask_of(sequence: int, window: int | None) -> Tensor:
    rows = int(STARTS[sequence + 1] - STARTS[sequence])
    length = int(LENGTHS[sequence])
    distance = torch.arange(length - rows, length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def rows_of(query: Tensor, sequence: int) -> Tensor:
    rows = query[STARTS[sequence] : STARTS[sequence + 1]]
    return rows.transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("sequence", [0, 1])
def test_plain_attention_is_that_of_torch(sequence: int, window: int | None) -> None:
    query, keys, values = made()
    out = paged_attention_reference(query, keys, values, TABLES, STARTS, LENGTHS, Rule(0.3, window))
    wanted = scaled_dot_product_attention(
        rows_of(query, sequence),
        dense(keys, sequence),
        dense(values, sequence),
        attn_mask=mask_of(sequence, window),
        scale=0.3,
        enable_gqa=True,
    )
    rows = slice(int(STARTS[sequence]), int(STARTS[sequence + 1]))
    torch.testing.assert_close(out[rows], wanted[0].transpose(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_softcap_and_sinks_are_those_of_models(kind: str) -> None:
    query, keys, values = made()
    sinks = torch.randn(HEADS, dtype=torch.float64)
    rule = Rule(0.3, 7, 2.0, None) if kind == "softcap" else Rule(0.3, 7, None, sinks)
    out = paged_attention_reference(query, keys, values, TABLES, STARTS, LENGTHS, rule)
    module = SimpleNamespace(num_key_value_groups=GROUP, sinks=sinks, training=False)
    mask = torch.where(mask_of(0, 7), 0.0, -torch.inf).double()[None, None]
    arguments = module, rows_of(query, 0), dense(keys, 0), dense(values, 0), mask
    if kind == "softcap":
        wanted = modeling_gemma2.eager_attention_forward(*arguments, scaling=0.3, softcap=2.0)[0]
    else:
        wanted = modeling_gpt_oss.eager_attention_forward(*arguments, scaling=0.3)[0]
    # Models have their softmax in float32.
    torch.testing.assert_close(out[:5], wanted[0], rtol=0, atol=1e-6)


def test_rotation_is_that_of_llama() -> None:
    query, keys, values = made()
    config = LlamaConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(query.float(), torch.arange(LENGTH).unsqueeze(0))
    turned_keys = modeling_llama.apply_rotary_pos_emb(
        dense(keys, 0), dense(keys, 0), cos.double(), sin.double()
    )[0]
    turned_rows = modeling_llama.apply_rotary_pos_emb(
        rows_of(query, 0), rows_of(query, 0), cos[:, -5:].double(), sin[:, -5:].double()
    )[0]
    wanted = scaled_dot_product_attention(
        turned_rows, turned_keys, dense(values, 0), mask_of(0, None), scale=0.3, enable_gqa=True
    )
    frequencies = embedding.inv_freq.expand(2, -1)
    shape = TABLES, STARTS, LENGTHS, Rule(0.3)
    out = paged_attention_reference(query, keys, values, *shape, frequencies=frequencies)
    torch.testing.assert_close(out[:5], wanted[0].transpose(0, 1), rtol=0, atol=1e-6)
    # Halves to neighbours in queries and keys alike: the same scores, in the other layout.
    order = torch.arange(DIM).view(2, -1).T.flatten()
    neighbours = query[..., order], keys[..., order], values
    interleaved = paged_attention_reference(
        *neighbours, *shape, frequencies=frequencies, interleaved=True
    )
    torch.testing.assert_close(interleaved, out, rtol=0, atol=1e-12)


def test_ratios_divide_positions_and_scales_multiply() -> None:
    query, keys, values = made()
    shape = TABLES, STARTS, LENGTHS, Rule(0.3)
    frequencies = torch.rand(2, 4)
    plain = paged_attention_reference(query, keys, values, *shape, frequencies=frequencies / 2)
    halved = paged_attention_reference(
        query, keys, values, *shape, frequencies=frequencies, ratios=torch.full((2, HEADS), 2.0)
    )
    torch.testing.assert_close(halved, plain, rtol=0, atol=1e-6)
    scaled = paged_attention_reference(
        query,
        keys,
        values,
        *shape,
        frequencies=torch.zeros(2, DIM // 2),
        scales=torch.tensor([2.0, 1]),
    )
    larger = paged_attention_reference(query, keys, values, TABLES, STARTS, LENGTHS, Rule(1.2))
    torch.testing.assert_close(scaled[:5], larger[:5], rtol=0, atol=1e-12)
