"""Models whose steps are metered, with chunks and without."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import core_fpdt
from core.testing.tiny import build
from core_fpdt.measuring import Meter, hosted
from core_fpdt.store import making


class Steps:
    """Meters forward and backward passes of one model."""

    def __init__(self, family: str = "Llama", **config: Any) -> None:
        self.model: Any = build(family, **config).train()

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
        gc.collect()
        with Meter(self.model) as meter:
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.model.zero_grad()
        return meter


@pytest.fixture(name="steps", scope="session")
def _steps() -> Callable[..., Steps]:
    return functools.cache(Steps)


@pytest.fixture(autouse=True)
def _host_of_the_simulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ordinary memory, and has to be told apart."""
    plain = making.plain_memory

    def marked(nbytes: int) -> Any:
        with hosted():
            return plain(nbytes)

    monkeypatch.setattr(making, "plain_memory", marked)
