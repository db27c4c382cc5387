"""What a live DeepSpeed engine holds, gathered without its checkpoints: what files must agree with.

ZeRO-1 and 2 keep flat groups into which the weights are views, so their addresses tell where a
weight lies. ZeRO-3 gathers through :mod:`deepspeed.utils`. Tensor-parallel slices are joined along
the dimension of the layer that holds them, experts get their number in the whole model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ucp.deepspeed_cases import Case

Tensors = dict[str, Tensor]


def gather(engine: Any, case: Case) -> Tensors:
    """Everything of a run by key, complete on rank 0.

    ``model.<name>`` is a weight at full precision, ``optim.state.<name>.<state>`` what the
    optimizer keeps for it, ``half.<name>`` the weight that computes (also buffers).
    """
    with torch.no_grad():
        mine = _zero3(engine) if case.stage == 3 else _local(engine, case)
    return _joined(mine, _dimensions(engine.module) if case.tp > 1 else {}, case)


def _named(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return list(engine.module.named_parameters())


def _buffers(engine: Any) -> Tensors:
    """Buffers that a state dict holds."""
    persistent = set(engine.module.state_dict())
    named = engine.module.named_buffers()
    return {f"half.{name}": value.clone() for name, value in named if name in persistent}


def _zero3(engine: Any) -> Tensors:
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = _buffers(engine)
    groups = engine.optimizer.fp16_groups
    held = {id(p): index for index, group in enumerate(groups) for p in group}
    for name, parameter in _named(engine):
        with zero.GatheredParameters([parameter]):
            found[f"half.{name}"] = parameter.detach().clone()
        if id(parameter) not in held:
            continue
        found[f"model.{name}"] = _required(safe_get_full_fp32_param(parameter))
        flat = engine.optimizer.fp32_partitioned_groups_flat[held[id(parameter)]]
        for state, value in engine.optimizer.optimizer.state[flat].items():
            key = f"optim.state.{name}.{state}"
            if not torch.is_tensor(value) or value.dim() == 0:
                found[key] = torch.as_tensor(value, dtype=torch.float32)
            else:
                found[key] = _required(safe_get_full_optimizer_state(parameter, state))
    return found


def _required(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.clone()


def _local(engine: Any, case: Case) -> Tensors:
    """Stages 0 to 2: all that is on this rank's part of the model."""
    found = _buffers(engine)
    found |= {f"half.{n}": p.detach().clone() for n, p in _named(engine)}
    names = {id(parameter): name for name, parameter in _named(engine)}
    optimizer = engine.optimizer
    if hasattr(optimizer, "bit16_groups"):
        _flat_groups(optimizer, names, found)
    elif hasattr(optimizer, "fp16_groups"):
        _whole_copies(optimizer, names, found)
    elif hasattr(optimizer, "bf16_groups"):
        _bf16_groups(optimizer, names, found)
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _keep(found, names[id(parameter)], parameter, optimizer.state[parameter])
    return found


def _flat_groups(optimizer: Any, names: dict[int, str], found: Tensors) -> None:
    for index, group in enumerate(optimizer.bit16_groups):
        mine = optimizer.single_partition_of_fp32_groups[index]
        ranks = optimizer.real_dp_process_group[index]
        flat = optimizer.bit16_groups_flat[index]
        states = {"": mine} | dict(optimizer.optimizer.state[mine].items())
        whole = {state: _whole(value, ranks) for state, value in states.items()}
        for parameter in group:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            _slice(found, names[id(parameter)], whole, start, parameter)


def _bf16_groups(optimizer: Any, names: dict[int, str], found: Tensors) -> None:
    for index, group in enumerate(optimizer.bf16_groups):
        mine = optimizer.fp32_groups_flat_partition[index]
        ranks = optimizer.real_dp_process_group[index]
        flat = optimizer.bf16_groups_flat[index]
        states = {"": mine} | dict(optimizer.optimizer.state[mine].items())
        whole = {state: _whole(value, ranks) for state, value in states.items()}
        for parameter in group:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            _slice(found, names[id(parameter)], whole, start, parameter)


def _whole(value: Any, ranks: Any) -> Tensor:
    if not torch.is_tensor(value) or value.dim() == 0:
        return torch.as_tensor(value, dtype=torch.float32)
    parts: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(parts, value.detach().clone(), group=ranks)
    return torch.cat(parts)


def _slice(found: Tensors, name: str, whole: Tensors, start: int, like: Tensor) -> None:
    for state, value in whole.items():
        key = f"optim.state.{name}.{state}" if state else f"model.{name}"
        found[key] = (
            value[start : start + like.numel()].view_as(like).clone() if value.dim() else value
        )


def _whole_copies(optimizer: Any, names: dict[int, str], found: Tensors) -> None:
    flat_copies = getattr(optimizer, "fp32_groups_flat", None)
    for index, group in enumerate(optimizer.fp16_groups):
        if flat_copies is None:
            for parameter, master in zip(group, optimizer.fp32_groups[index], strict=True):
                _keep(found, names[id(parameter)], master, optimizer.optimizer.state[master])
            continue
        states = {"": flat_copies[index]} | optimizer.optimizer.state[flat_copies[index]]
        whole = {state: torch.as_tensor(value) for state, value in states.items()}
        flat = optimizer.fp16_groups_flat[index]
        for parameter in group:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            _slice(found, names[id(parameter)], whole, start, parameter)


def _keep(found: Tensors, name: str, master: Tensor, states: dict[str, Any]) -> None:
    found[f"model.{name}"] = master.detach().clone()
    for state, value in states.items():
        if value is not None:
            found[f"optim.state.{name}.{state}"] = torch.as_tensor(value).detach().clone()


def _dimensions(model: nn.Module) -> dict[str, int]:
    """The dimension that AutoTP has cut a weight along, by name."""
    cut: dict[str, int] = {}
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ == "LinearAllreduce":
                cut[f"{name}.weight"] = 1
            elif base.__name__ in ("LinearLayer", "VocabParallelEmbedding"):
                cut[f"{name}.weight"] = cut[f"{name}.bias"] = 0
    return cut


_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


def _joined(mine: Tensors, dimensions: dict[str, int], case: Case) -> Tensors:
    """What all ranks have, in one."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if case.tp > 1:
        return {key: _along(key, everyone[: case.tp], dimensions) for key in mine}
    whole: Tensors = {}
    for rank, tensors in enumerate(everyone):
        for key, value in tensors.items():
            match = _EXPERT.fullmatch(key)
            name = key
            if match:
                number = int(match[2]) + rank % case.ep * (4 // case.ep)
                name = f"{match[1]}{number}{match[3]}"
            whole.setdefault(name, value)
    return whole


def _along(key: str, everyone: list[Tensors], dimensions: dict[str, int]) -> Tensor:
    parts = [tensors[key] for tensors in everyone]
    name = key.removeprefix("half.").removeprefix("model.")
    if key.startswith("optim.state."):
        name = key.removeprefix("optim.state.").rpartition(".")[0]
    if name not in dimensions or parts[0].dim() == 0:
        return parts[0]
    return torch.cat(parts, dim=dimensions[name])
