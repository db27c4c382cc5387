"""Between live training objects and what a checkpoint stores: named tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from core.errors import CheckpointError

State = Mapping[str, Any]
"""What is saved, by name: modules, optimizers, objects with ``state_dict``, tensors and values."""

_OPTIMIZER = StateDictOptions(flatten_optimizer_state_dict=True)


@runtime_checkable
class Stateful(Protocol):
    """Anything with ``state_dict()`` and ``load_state_dict()``: schedulers, loaders, counters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def split(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten ``state`` into tensors by dotted key, and JSON values by dotted key.

    Parameters keep their plain names whatever wraps the model (DDP, FSDP2), and optimizer state is
    keyed by parameter name, so that another number of ranks can load it.

    Raises:
        CheckpointError: for a value that is neither a tensor nor JSON, naming its key.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, part in state.items():
        for key, leaf in _leaves(name, _state_dict(state, name, part)):
            if isinstance(leaf, Tensor):
                tensors[key] = leaf
            else:
                values[key] = encode(leaf, key)
    return tensors, values


def restore(state: State, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put loaded tensors and values back into the live objects of ``state``.

    Raises:
        CheckpointError: for a value that ``state`` has and the checkpoint lacks.
    """
    for name, part in state.items():
        if isinstance(part, Tensor):
            part.copy_(tensors[name])
        elif isinstance(part, nn.Module):
            set_model_state_dict(part, _rebuild(state, name, part, tensors, values))
        elif isinstance(part, Optimizer):
            filled = _rebuild(state, name, part, tensors, values)
            set_optimizer_state_dict(_owner(state, part), part, filled, options=_OPTIMIZER)
        elif isinstance(part, Stateful):
            part.load_state_dict(_rebuild(state, name, part, tensors, values))
        elif isinstance(part, dict):
            part.update(_rebuild(state, name, part, tensors, values))


def loaded_values(state: State, values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of ``state`` (numbers, strings) as the checkpoint has them."""
    plain = (name for name, part in state.items() if not isinstance(part, Tensor | Mapping))
    return {name: decode(values[name]) for name in plain if name in values}


def _state_dict(state: State, name: str, part: Any) -> Any:
    if isinstance(part, nn.Module):
        return get_model_state_dict(part)
    if isinstance(part, Optimizer):
        return get_optimizer_state_dict(_owner(state, part), part, options=_OPTIMIZER)
    if isinstance(part, Stateful):
        return part.state_dict()
    return part


def _owner(state: State, optimizer: Optimizer) -> nn.Module:
    """The module of ``state`` whose parameters ``optimizer`` steps."""
    first = optimizer.param_groups[0]["params"][0]
    for part in state.values():
        if isinstance(part, nn.Module) and any(p is first for p in part.parameters()):
            return part
    raise CheckpointError(
        "an optimizer is saved without its model", fix="put the model into the same state"
    )


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings; sequences are leaves unless they hold tensors."""
    if isinstance(tree, Mapping):
        for key, inner in tree.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    elif isinstance(tree, list | tuple) and any(isinstance(item, Tensor) for item in tree):
        for index, inner in enumerate(tree):
            yield from _leaves(f"{prefix}.{index}", inner)
    else:
        yield prefix, tree


def _rebuild(
    state: State, name: str, part: Any, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> dict[str, Any]:
    def fill(prefix: str, tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {key: fill(f"{prefix}.{key}", inner) for key, inner in tree.items()}
        if isinstance(tree, list | tuple) and any(isinstance(item, Tensor) for item in tree):
            return type(tree)(fill(f"{prefix}.{i}", inner) for i, inner in enumerate(tree))
        if isinstance(tree, Tensor):
            return tensors[prefix]
        if prefix not in values:
            raise CheckpointError(f"the checkpoint has no value {prefix!r}")
        return decode(values[prefix])

    return cast(dict[str, Any], fill(name, _state_dict(state, name, part)))


def encode(value: Any, key: str) -> Any:
    """Encode a value as JSON that :func:`decode` turns back into an equal one.

    Raises:
        CheckpointError: for a value that JSON cannot hold, naming ``key``.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, key) for item in value]}
    if isinstance(value, list):
        return [encode(item, key) for item in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v, f"{key}.{k}") for k, v in value.items()}}
    raise CheckpointError(
        f"{key!r} is a {type(value).__name__}, which a checkpoint cannot hold",
        why="checkpoints hold tensors, numbers, strings, and lists and dicts of them",
        fix="leave it out of state_dict(), or store what rebuilds it",
    )


def decode(value: Any) -> Any:
    """Turn what :func:`encode` made back into the value."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(decode(item) for item in content)
        if kind == "float":
            return float(content)
        return {key: decode(item) for key, item in content.items()}
    return value
