"""What is remembered of a state is what a walk through it finds, whatever has changed since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.checkpoints.outline import Outlines
from core.checkpoints.state import Parts, split


class Net(nn.Module):
    """Tied weights, buffers, a module that is used twice, and one called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.module = nn.Linear(8, 8)
        self.twice = nn.ModuleList([self.module, nn.BatchNorm1d(8)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(ids)
        for layer in self.twice:
            hidden = layer(hidden)
        return self.head(hidden)


class Training:
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.net = Net()
        decayed = [p for p in self.net.parameters() if p.dim() > 1]
        rest = [p for p in self.net.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = optimizer(groups, lr=0.1)
        self.state: dict[str, Any] = {"net": self.net, "optimizer": self.optimizer, "n": 1}

    def step(self) -> None:
        self.net(torch.arange(11)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def same(left: Parts, right: Parts) -> None:
    assert list(left.tensors) == list(right.tensors)
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        assert tensor.data_ptr() == other.data_ptr(), name
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
    assert left.values == right.values
    assert left.stable == right.stable


def remembers(outlines: Outlines, training: Training) -> bool:
    parts = (training.net, training.optimizer)
    return all(outlines.again(part, training.net) is not None for part in parts)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_the_second_look_finds_what_the_first_did(optimizer: Any) -> None:
    training, outlines = Training(optimizer), Outlines()
    training.step()
    outlines_of_a_reversed_state = Outlines()
    reversed_state = dict(reversed(training.state.items()))
    for _ in range(3):
        training.step()
        same(split(training.state, outlines), split(training.state))
        same(split(reversed_state, outlines_of_a_reversed_state), split(reversed_state))
    if optimizer is not torch.optim.SGD:  # without momentum there is no state to remember
        assert remembers(outlines, training)


CHANGES: dict[str, Callable[[Training], object]] = {
    "a replaced parameter": lambda t: setattr(
        t.net.module, "weight", nn.Parameter(torch.ones(8, 8))
    ),
    "other data": lambda t: setattr(t.net.module.bias, "data", torch.ones(8)),
    "a resized parameter": lambda t: setattr(t.net.embed.weight, "data", torch.ones(13, 8)),
    "another dtype": lambda t: t.net.twice[1].to(torch.float64),
    "a new layer": lambda t: t.net.add_module("more", nn.Linear(2, 2)),
    "a layer less": lambda t: delattr(t.net, "twice"),
    "another layer": lambda t: setattr(t.net, "module", nn.Linear(8, 8)),
    "a new parameter": lambda t: t.net.register_parameter("p", nn.Parameter(torch.ones(2))),
    "a new buffer": lambda t: t.net.register_buffer("b", torch.ones(2)),
    "untied weights": lambda t: setattr(t.net.head, "weight", nn.Parameter(torch.ones(11, 8))),
    "a replaced state": lambda t: t.optimizer.state[t.net.embed.weight].update(
        exp_avg=torch.full((11, 8), 3.0)
    ),
    "a new state entry": lambda t: t.optimizer.state[t.net.embed.weight].update(ema=torch.ones(2)),
    "a number in the state": lambda t: t.optimizer.state[t.net.embed.weight].update(count=3),
    "another learning rate": lambda t: t.optimizer.param_groups[0].update(lr=0.5),
    "a new setting": lambda t: t.optimizer.param_groups[1].update(warm=True),
    "no state": lambda t: t.optimizer.state.clear(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str) -> None:
    training, outlines = Training(), Outlines()
    training.step()
    split(training.state, outlines)
    assert remembers(outlines, training)
    CHANGES[change](training)
    wanted: Parts | str
    try:
        wanted = split(training.state)
    except Exception as error:
        wanted = str(error)
    training_again = split_or_error(training.state, outlines)
    if isinstance(wanted, str):
        assert training_again == wanted
    else:
        assert isinstance(training_again, Parts)
        if change == "no state":  # torch takes a step to make one, so no two looks share memory
            assert list(wanted.tensors) == list(training_again.tensors)
        else:
            same(training_again, wanted)


def split_or_error(state: dict[str, Any], outlines: Outlines) -> Parts | str:
    try:
        return split(state, outlines)
    except Exception as error:
        return str(error)


def test_a_state_dict_of_its_own_is_asked_every_time() -> None:
    class Counting(nn.Linear):
        asked = 0

        def get_extra_state(self) -> Any:
            self.asked += 1
            return {"asked": self.asked}

        def set_extra_state(self, state: Any) -> None:
            pass

    net, outlines = Counting(2, 2), Outlines()
    first, second = (split({"net": net}, outlines).values for _ in range(2))
    assert first != second


def test_hooks_that_change_values_are_honoured() -> None:
    net, outlines = nn.Linear(2, 2), Outlines()

    def doubled(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    net.register_state_dict_post_hook(doubled)
    for _ in range(2):
        assert torch.equal(split({"net": net}, outlines).tensors["net.weight"], net.weight * 2)


def test_a_hook_that_comes_later_is_honoured() -> None:
    training, outlines = Training(), Outlines()
    split(training.state, outlines)
    calls = []
    training.net.module.register_state_dict_pre_hook(lambda *_: calls.append(1))
    for number in range(1, 4):
        split(training.state, outlines)
        assert len(calls) >= number


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_an_optimizer_are_honoured(late: bool) -> None:
    training, outlines = Training(), Outlines()
    training.step()
    calls = []
    if late:
        split(training.state, outlines)
    training.optimizer.register_state_dict_post_hook(lambda *_: calls.append(1))
    for number in range(1, 4):
        split(training.state, outlines)
        assert len(calls) >= number


def test_nothing_is_kept_alive() -> None:
    import gc
    import weakref

    training, outlines = Training(), Outlines()
    training.step()
    split(training.state, outlines)
    net, optimizer = weakref.ref(training.net), weakref.ref(training.optimizer)
    weight = weakref.ref(training.net.module.weight)
    del training
    gc.collect()
    assert (net(), optimizer(), weight()) == (None, None, None)


def test_a_copy_of_a_model_is_another_one() -> None:
    training, outlines = Training(), Outlines()
    split(training.state, outlines)
    other = {"net": copy.deepcopy(training.net)}
    same(split(other, outlines), split(other))


def test_ddp_keeps_plain_names(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        training, outlines = Training(), Outlines()
        training.step()
        wrapped = DistributedDataParallel(training.net)
        state = {"net": wrapped, "optimizer": training.optimizer}
        for _ in range(2):
            found = split(state, outlines)
            same(found, split(state))
            assert "net.module.weight" in found.tensors or "net.embed.weight" in found.tensors
    finally:
        torch.distributed.destroy_process_group()
