from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from core.testing import tiny

Gradients = dict[str, Tensor]


@pytest.fixture
def tokens() -> Callable[..., dict[str, Tensor]]:
    """Makes token ids with their labels."""

    def make(rows: int = 2, length: int = 53, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, tiny.VOCABULARY, (rows, length), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}

    return make


@pytest.fixture
def trained() -> Callable[..., Gradients]:
    """Runs one step; gives the loss and all gradients."""

    def step(model: nn.Module, batch: dict[str, Tensor], scale: float = 1.0) -> Gradients:
        model.zero_grad()
        model.train()
        loss = model(**batch, use_cache=False).loss
        (loss * scale).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().clone(), **found}

    return step


@pytest.fixture
def distance() -> Callable[[Gradients, Gradients], float]:
    """Largest relative difference of norms of any tensor; all have to be finite."""

    def of(found: Gradients, wanted: Gradients) -> float:
        assert found.keys() == wanted.keys()
        worst = 0.0
        for name, tensor in wanted.items():
            assert found[name].isfinite().all(), name
            off = (found[name].double() - tensor.double()).norm()
            worst = max(worst, float(off / tensor.double().norm().clamp_min(1e-30)))
        return worst

    return of
