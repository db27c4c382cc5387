"""Staging: copies at the call, live tensors only when they have proven to keep still."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core_fastpersist.dcp.staging import Staged, Staging
from core_fastpersist.direct.carrier import ThreadCarrier
from core_fastpersist.direct.remote import ProcessCarrier


class Loop:
    """A model whose weight average is kept by hand, outside of any optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.average = self.model.weight.detach().clone()

    def state(self) -> dict[str, torch.Tensor]:
        moments = self.optimizer.state.get(self.model.weight, {})
        found = {"weight": self.model.weight, "average": self.average}
        return found | {key: value for key, value in moments.items() if value.dim()}

    def between(self) -> None:
        self.average.lerp_(self.model.weight.detach(), 0.1)
        self.model(torch.ones(2, 64)).sum().backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def state_of(staged: Staged) -> dict[str, Any]:
    assert isinstance(staged.state, dict)
    return staged.state


def is_live(staged: Staged, name: str, tensor: torch.Tensor) -> bool:
    return bool(state_of(staged)[name].data_ptr() == tensor.data_ptr())


def test_the_audit_finds_what_changes_between_two_steps(caplog: pytest.LogCaptureFixture) -> None:
    loop, staging = Loop(), Staging(mode="live", audits=2)
    loop.between()
    loop.step()
    with caplog.at_level(logging.INFO, "core_fastpersist"):
        for number in range(5):
            staged = staging.stage(loop.state())
            trusted = number >= 2
            assert is_live(staged, "weight", loop.model.weight) == trusted
            assert is_live(staged, "exp_avg", loop.state()["exp_avg"]) == trusted
            assert not is_live(staged, "average", loop.average)
            assert (staged.live is not None) == trusted
            kept = loop.average.clone()
            loop.between()
            assert torch.equal(state_of(staged)["average"], kept)
            staged.release()
            loop.step()
    assert staging.audit.volatile == {"average"}
    assert "average changes between optimizer steps" in caplog.text
    staging.close()


def test_a_tensor_that_is_new_must_prove_itself_first() -> None:
    staging = Staging(mode="live", audits=1)
    weight = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for number in range(3):
        staged = staging.stage({"weight": weight})
        assert is_live(staged, "weight", weight) == (number >= 1)
        staged.release()
        weight.grad = torch.ones(8)
        optimizer.step()
    other = torch.zeros(4)
    staged = staging.stage({"weight": weight, "other": other})
    assert is_live(staged, "weight", weight)
    assert not is_live(staged, "other", other)
    staging.close()


def test_live_is_done_when_the_writer_lets_go() -> None:
    staging = Staging(mode="live", audits=0)
    staged = staging.stage({"w": torch.zeros(8)})
    assert staged.live is not None
    assert not staged.live.done()
    staged.release()
    assert staged.live.done()
    staging.close()


def test_copies_of_a_checkpoint_that_is_still_written_stay() -> None:
    staging = Staging(mode="copy")
    first = staging.stage({"w": torch.zeros(100_000)})
    second = staging.stage({"w": torch.ones(100_000)})
    assert not state_of(first)["w"].any()
    assert state_of(second)["w"].all()
    first.release()
    second.release()
    third = staging.stage({"w": torch.full((100_000,), 2.0)})
    assert third.area is second.area
    staging.close()


def test_auto_copies_only_what_memory_allows(caplog: pytest.LogCaptureFixture) -> None:
    small, large = {"w": torch.zeros(1000)}, {"w": torch.zeros(100_000)}
    staging = Staging(mode="auto", memory=100_000, audits=0)
    assert not is_live(staging.stage(small), "w", small["w"])
    with caplog.at_level(logging.INFO, "core_fastpersist"):
        assert is_live(staging.stage(large), "w", large["w"])
    assert "do not fit" in caplog.text
    staging.close()


def test_copies_go_to_a_process_and_live_tensors_to_threads(tmp_path: Path) -> None:
    staging = Staging(mode="copy")
    staged = staging.stage({"w": torch.zeros(1000)})
    carrier = staging.carrier(staged)
    assert isinstance(carrier, ProcessCarrier)
    assert staging.carrier(staged) is carrier
    staging.close()
    assert not carrier.alive
    live = Staging(mode="live", audits=0)
    assert isinstance(live.carrier(live.stage({"w": torch.zeros(1000)})), ThreadCarrier)
    assert isinstance(live.carrier(None), ThreadCarrier)
    threads = Staging(mode="copy", writer="thread")
    assert isinstance(threads.carrier(threads.stage({"w": torch.zeros(10)})), ThreadCarrier)
    for one in (live, threads):
        one.close()


def test_plain_values_are_those_of_the_call() -> None:
    staging = Staging(mode="live", audits=0)
    history = [1, 2]
    staged = staging.stage({"w": torch.zeros(3), "nested": {"history": history, "n": 1}})
    history.append(3)
    assert state_of(staged)["nested"] == {"history": [1, 2], "n": 1}
    staging.close()
