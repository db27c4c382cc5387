"""Tiny models for runs of DeepSpeed: odd sizes, so that every kind of padding turns up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from ucp.deepspeed_cases import Case

VOCABULARY = 97
WIDTH = 20
TOKENS = 8
BATCH = 12


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and what follows them at a step, shape ``(BATCH, TOKENS)`` each."""
    drawn = torch.randint(
        VOCABULARY, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(1000 + step)
    )
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens, in single precision."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class Block(nn.Module):
    """Attention over the past and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, width)
        self.down = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(x)))


class Blocks(nn.Module):
    """A decoder with a buffer, and a weight of one number."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(case.width, case.heads) for _ in range(2))
        self.temperature = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("offset", torch.linspace(0, 1, VOCABULARY))
        if case.empty:
            self.unused = nn.Parameter(torch.zeros(0, 3))
        if case.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x) * self.temperature + self.offset.to(x.dtype), labels)


class Head(nn.Module):
    """A decoder of transformers that returns its loss."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.decoder(input_ids=tokens).logits, labels)


class Experts(nn.Module):
    """A decoder whose feed-forward layer is a mixture of four experts, twice."""

    def __init__(self, case: Case) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            MoE(WIDTH, _Expert(case.width), 4, case.ep, capacity_factor=4.0, use_rts=False)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            mixed, _, _ = block(x)
            x = x + mixed
        return cross_entropy(self.head(x), labels)


class _Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, width)
        self.down = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


def pipeline(case: Case) -> nn.Module:
    """Layers for :class:`deepspeed.pipe.PipelineModule`, with a tied embedding."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    def logits(layer: nn.Module, x: Tensor) -> Tensor:
        return functional.linear(x, layer.weight)

    embedding: list[Any]
    if case.tied:
        embedding = [
            TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH),
            TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=logits),
        ]
    else:
        embedding = [
            LayerSpec(nn.Embedding, VOCABULARY, WIDTH),
            LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False),
        ]
    blocks = [LayerSpec(Block, case.width, case.heads) for _ in range(4)]
    return PipelineModule(
        [embedding[0], *blocks, nn.Identity(), embedding[1]],
        num_stages=case.pp,
        loss_fn=cross_entropy,
        partition_method="uniform",
    )


def build(case: Case) -> nn.Module:
    """The model of a case, the same on every rank."""
    torch.manual_seed(7)
    match case.model:
        case "blocks":
            return Blocks(case)
        case "llama":
            from transformers import LlamaConfig, LlamaForCausalLM

            return Head(
                LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=VOCABULARY,
                        hidden_size=24,
                        intermediate_size=case.width,
                        num_hidden_layers=2,
                        num_attention_heads=2 * case.heads,
                        num_key_value_heads=case.heads,
                        max_position_embeddings=32,
                        tie_word_embeddings=case.tied,
                    )
                )
            )
        case "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            return Head(
                GPT2LMHeadModel(
                    GPT2Config(
                        vocab_size=VOCABULARY,
                        n_positions=16,
                        n_embd=WIDTH,
                        n_layer=2,
                        n_head=2,
                        resid_pdrop=0.0,
                        embd_pdrop=0.0,
                        attn_pdrop=0.0,
                    )
                )
            )
        case "moe":
            return Experts(case)
        case _:
            return pipeline(case)
