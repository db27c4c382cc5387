"""Models whose steps are metered, with chunks and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import core_fpdt
from core.testing.tiny import build
from core_fpdt.measuring import Meter

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2**16,
}


class Steps:
    """Meters forward and backward passes of one model."""

    def __init__(self, **config: Any) -> None:
        self.model: Any = build("Llama", **SMALL | config).train()

    def plain(self, tokens: int) -> Meter:
        """Torch's own attention, everything kept."""
        return self._step(tokens)

    def checkpointed(self, tokens: int) -> Meter:
        """Gradient checkpointing of transformers."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return self._step(tokens)
        finally:
            self.model.gradient_checkpointing_disable()

    def chunked(self, tokens: int, **settings: Any) -> Meter:
        """Ours."""
        with core_fpdt.enable(self.model, strict=False, **settings):
            return self._step(tokens)

    def _step(self, tokens: int) -> Meter:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (1, tokens), generator=generator)
        self.model.zero_grad()
        with Meter(self.model) as meter:
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.model.zero_grad()
        return meter


@pytest.fixture(name="large_vocabulary", scope="session")
def _large_vocabulary() -> Steps:
    return Steps(vocab_size=32000)


@pytest.fixture(name="small_vocabulary", scope="session")
def _small_vocabulary() -> Steps:
    return Steps(vocab_size=1000)
