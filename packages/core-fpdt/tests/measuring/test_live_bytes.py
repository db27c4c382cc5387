"""The meter sums what lives, nothing twice and nothing after its end."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from core.testing.tiny import build
from core_fpdt.measuring import Meter, hosted, per_token

KIB = 1024


def kib(count: int = 1) -> Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_a_storage_counts_while_it_lives() -> None:
    with Meter() as meter:
        first = kib(3)
        second = kib(2)
        del first
        third = kib(1)
        assert meter.current == 3 * KIB
    assert meter.peak == 5 * KIB
    del second, third
    assert meter.current == 0


def test_views_count_once() -> None:
    with Meter() as meter:
        base = kib(4)
        view = base.view(4, KIB)[1:].t()
        del base
        assert meter.current == 4 * KIB
        del view
        assert meter.current == 0


def test_results_written_into_given_memory_are_no_new_memory() -> None:
    left = torch.ones(KIB)
    with Meter() as meter:
        out = torch.empty(KIB)
        torch.add(left, left, out=out)
        out.mul_(2)
    assert meter.peak == 2 * 4 * KIB  # left was there before, and was read
    assert torch.equal(out, left * 4)


def test_what_existed_before_counts_from_its_first_use() -> None:
    before = kib(8)
    with Meter() as meter:
        assert meter.current == 0
        before.sum()
        assert meter.current == 8 * KIB


def test_an_address_that_is_used_again_counts_again() -> None:
    with Meter() as meter:
        for _ in range(50):
            kib(64)
    assert meter.peak == 64 * KIB
    assert meter.current == 0


def test_storages_may_die_in_another_thread() -> None:
    with Meter() as meter:
        held = [kib(2)]
        worker = threading.Thread(target=held.clear)
        worker.start()
        worker.join()
        assert meter.current == 0
    assert meter.peak == 2 * KIB


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        return 2 * value * grad


@pytest.mark.parametrize("grad", [False, True])
def test_functions_are_seen_with_and_without_a_graph(grad: bool) -> None:
    value = torch.ones(KIB, requires_grad=True)
    with torch.set_grad_enabled(grad), Meter() as meter:
        result = Squares.apply(value)
        assert meter.current == 2 * 4 * KIB
        if grad:
            result.sum().backward()
            del result
            assert meter.current == 2 * 4 * KIB  # the value and its gradient
            # Value, result, gradient of the sum (expanded), 2 * value, and the product.
            assert meter.peak == 4 * 4 * KIB + 8
    assert (value.grad is not None) is grad


def test_parameters_and_their_gradients_count_apart() -> None:
    layer = nn.Linear(16, 32, bias=False)
    frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)
    model = nn.Sequential(frozen, layer)
    with Meter(model) as meter:
        model(torch.ones(1, 16)).sum().backward()
        assert meter.parameters == 4 * (16 * 32 + 16 * 16)
        assert meter.gradients == 4 * 16 * 32
        layer.weight.grad = None
        assert meter.gradients == 0
    assert meter.device_peak >= meter.parameters + 4 * 16 * 32
    assert meter.peak < meter.device_peak


def test_a_meter_leaves_no_hooks_behind() -> None:
    layer = nn.Linear(4, 4, bias=False)
    with Meter(layer) as meter:
        pass
    layer(torch.ones(1, 4)).sum().backward()
    gc.collect()
    assert meter.gradients == 0


def test_host_memory_counts_apart(tmp_path: Path) -> None:
    file = tmp_path / "chunks"
    with Meter() as meter:
        with hosted():
            kept = kib(16)
        mapped = torch.from_file(str(file), shared=True, size=8 * KIB, dtype=torch.uint8)
        mapped.fill_(1)
        fetched = kept + 0
        assert meter.host_current == 24 * KIB
        assert meter.current == 16 * KIB
        del kept, mapped, fetched
    assert meter.host_peak == 24 * KIB
    assert meter.host_current == meter.current == 0


def test_a_predicate_tells_of_host_memory() -> None:
    own = kib(4)
    address = own.untyped_storage().data_ptr()
    with Meter(host=lambda storage: storage.data_ptr() == address) as meter:
        own.view(2, -1).sum(1, dtype=torch.uint8)
    assert meter.host_peak == 4 * KIB
    assert meter.peak == 2


def test_wrapped_tensors_count_as_what_they_hold() -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    with Meter() as meter:
        inner = torch.ones(KIB)
        total = AsyncCollectiveTensor(inner) + 1
        assert meter.current == 2 * 4 * KIB
        del total
        assert meter.current == 4 * KIB


class Promise(Tensor):
    """Has a size, and no memory."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.ones(KIB)


def test_tensors_without_memory_do_not_count() -> None:
    with Meter() as meter:
        hollow = Tensor._make_wrapper_subclass(Promise, (2**20,))  # type: ignore[attr-defined]
        made = hollow + 1
        assert meter.current == 4 * KIB
        del made, hollow
        assert meter.current == 0


def test_meta_tensors_do_not_count() -> None:
    with Meter() as meter:
        torch.empty(2**40, device="meta").view(2, -1)
        assert meter.peak == 0


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_training_step_takes_what_the_allocator_says(family: str) -> None:
    """The truth is torch's own record of every allocation, with what kernels take inside."""
    model = build(family, num_hidden_layers=2, max_position_embeddings=1024).train()
    ids = torch.randint(1, 96, (1, 1024))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    step()
    with Meter(model) as meter:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(allocations, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert meter.device_peak - meter.parameters == pytest.approx(peak, rel=0.03)


def test_per_token_is_a_slope() -> None:
    assert per_token(lambda tokens: 7 + 3 * tokens, 10, 20) == 3
    with pytest.raises(ValueError, match="no slope"):
        per_token(float, 20, 20)
