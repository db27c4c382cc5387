"""Whole models over stores that poison: not a bit differs from chunks that never leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.testing import tiny
from core_fpdt import enable
from core_fpdt.store.contract import Lane, Store
from core_fpdt.store.resident import ResidentStore
from core_fpdt.store.staged import StagedStore

LENGTH = 47
POLICIES = [
    {"keep_output": output, "keep_keys": keys}
    for output in (0.0, 0.3, 1.0)
    for keys in (True, False)
]


class Pieces(ResidentStore):
    """Chunks on the device, in single tensors as staged stores have them."""

    @property
    def offloads(self) -> bool:
        return True

    def lane(
        self,
        name: str,
        edges: Sequence[int],
        *,
        dim: int,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> Lane:
        return super().lane(name, edges, dim=dim, dtype=dtype, whole=False)


def _loss(model: nn.Module, seed: int) -> Tensor:
    batch = tiny.batch(seed, rows=2, length=LENGTH)
    batch["attention_mask"][1, :9] = 0
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def _two_steps_in_one(model: nn.Module) -> list[Tensor]:
    """Two passes forwards before any backwards, as preference losses do."""
    model.zero_grad()
    model.train()
    first, second = _loss(model, 0), _loss(model, 1)
    (second - 2 * first).backward()
    return [first.detach(), second.detach(), *(p.grad.clone() for p in model.parameters())]


def _run(model: nn.Module, store: Store, **settings: Any) -> list[Tensor]:
    with enable(model, chunk_tokens=13, strict=False, **settings) as enabled:
        enabled.runner.store = store
        return _two_steps_in_one(model)


@pytest.mark.parametrize("order", ["query", "key"])
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("llama", policy) for policy in POLICIES),
        *(("mistral", policy) for policy in POLICIES[1:3]),
    ],
    ids=str,
)
def test_gradients_are_the_same_bits(
    family: str, policy: dict[str, Any], order: str, poisoning: StagedStore
) -> None:
    model = tiny.MODELS[family](num_hidden_layers=2)
    wanted = _run(model, Pieces(torch.device("cpu")), order=order, **policy)
    found = _run(model, poisoning, order=order, **policy)
    assert all(tensor.isfinite().all() for tensor in wanted)
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    assert poisoning.used() == poisoning.on_device() == 0
    assert poisoning.counters.fetched > 0


@pytest.mark.parametrize("family", ["phi3", "qwen3", "longrope"])
def test_other_families_too(family: str, poisoning: StagedStore) -> None:
    model = tiny.MODELS[family](num_hidden_layers=2)
    settings = {"keep_output": 0.3, "order": "key"}
    wanted = _run(model, Pieces(torch.device("cpu")), **settings)
    assert all(a.equal(b) for a, b in zip(_run(model, poisoning, **settings), wanted, strict=True))


def test_a_graph_that_is_left_gives_its_chunks_back(poisoning: StagedStore) -> None:
    model = tiny.llama()
    with enable(model, chunk_tokens=13, strict=False) as enabled:
        enabled.runner.store = poisoning
        model.train()
        loss = _loss(model, 0)
        assert poisoning.used() > 0
        del loss
        assert poisoning.used() == poisoning.on_device() == 0
        with torch.no_grad():
            _loss(model, 0)
        assert poisoning.used() == poisoning.on_device() == 0


def test_what_is_kept_grows_with_the_sequence_and_buffers_do_not(poisoning: StagedStore) -> None:
    model = tiny.llama()
    held: list[tuple[int, int]] = []
    for chunks in (4, 8):
        with enable(model, chunk_tokens=8, strict=False) as enabled:
            enabled.runner.store = poisoning
            model.train()
            ids = tiny.batch(rows=1, length=8 * chunks)["input_ids"]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            held.append((poisoning.used(), poisoning.on_device()))
            loss.backward()
    (used, buffers), (twice, same) = held
    assert twice == 2 * used
    assert same == buffers
