"""Between live training objects and what a checkpoint stores: named tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from core.checkpoints.outline import Outlines
from core.checkpoints.values import Encoded, decode, encode, room_for
from core.errors import CheckpointError

State = Mapping[str, Any]
"""What is saved, by name: modules, optimizers, objects with ``state_dict``, tensors and values."""

_OPTIMIZER = StateDictOptions(flatten_optimizer_state_dict=True)


@runtime_checkable
class Stateful(Protocol):
    """Anything with ``state_dict()`` and ``load_state_dict()``: schedulers, loaders, counters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


@dataclass
class Parts:
    """A state taken apart.

    Attributes:
        tensors: by dotted name.
        values: encoded plain values by dotted name.
        stable: names of the tensors that only an optimizer step changes: parameters, and the
            state of optimizers.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Encoded] = field(default_factory=dict)
    stable: set[str] = field(default_factory=set)


def split(state: State, outlines: Outlines | None = None) -> Parts:
    """Take a state apart for saving.

    Parameters keep their plain names whatever wraps the model (DDP, FSDP2), and optimizer state is
    keyed by parameter name, so that another number of ranks can load it.

    Args:
        state: what is saved.
        outlines: what is remembered of the same objects from an earlier call.

    Raises:
        CheckpointError: for a value that a checkpoint cannot hold, naming its key.
    """
    parts = Parts()
    for name, part in state.items():
        inside = [other for other in state if other.startswith(f"{name}.")]
        if inside:
            raise CheckpointError(
                f"{name!r} and {inside[0]!r} cannot be told apart", fix="rename one"
            )
        if isinstance(part, Tensor):
            parts.tensors[name] = part
        elif isinstance(part, nn.Module | Optimizer):
            found = _flat(state, name, part, outlines)
            for key, leaf in found.items():
                if isinstance(leaf, Tensor):
                    parts.tensors[key] = leaf
                else:
                    parts.values[key] = encode(leaf, key, parts.tensors)
            parts.stable |= _stable(name, part, found, outlines)
        else:
            parts.values[name] = encode(_plain(part), name, parts.tensors)
    return parts


def room(state: State, saved: Iterable[str], values: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """Tensors to read a checkpoint into, by name; nothing of ``state`` is changed yet.

    What a model or an optimizer is made of must be in the checkpoint as a whole, and the other way
    round. The structure of everything else is that of the checkpoint.

    Args:
        state: the live objects.
        saved: names of all tensors in the checkpoint.
        values: its encoded plain values.

    Raises:
        CheckpointError: naming everything that one side has and the other lacks.
    """
    targets: dict[str, Tensor] = {}
    problems: list[str] = []
    known = {*saved, *values}
    for name, part in state.items():
        if isinstance(part, Tensor):
            targets[name] = part
            problems += [] if name in known else [f"it has no {name}"]
        elif isinstance(part, nn.Module | Optimizer):
            live = _flat(state, name, part)
            targets |= {key: leaf for key, leaf in live.items() if isinstance(leaf, Tensor)}
            below = {key for key in known if key.startswith(f"{name}.")}
            problems += _listed("it has no", live.keys() - known)
            problems += _listed(f"{type(part).__name__} takes no", below - live.keys())
        elif name in values:
            targets |= room_for(values[name], _plain(part))
        else:
            problems.append(f"it has no {name}")
    if problems:
        raise CheckpointError("; ".join(problems))
    return targets


def restore(state: State, tensors: Mapping[str, Tensor], values: Mapping[str, Encoded]) -> None:
    """Put what was read into :func:`room` back into the live objects of ``state``."""
    for name, part in state.items():
        if isinstance(part, nn.Module | Optimizer):
            filled = {
                key.removeprefix(f"{name}."): tensors[key] if key in tensors else decode(v, tensors)
                for key, v in {**tensors, **values}.items()
                if key.startswith(f"{name}.")
            }
            if isinstance(part, nn.Module):
                set_model_state_dict(part, filled)
            else:
                owner = _owner(state, part)
                set_optimizer_state_dict(owner, part, cast(Any, filled), options=_OPTIMIZER)
        elif isinstance(part, Stateful):
            part.load_state_dict(decode(values[name], tensors))
        elif isinstance(part, dict):
            part.clear()
            part.update(decode(values[name], tensors))


def loaded_values(
    state: State, tensors: Mapping[str, Tensor], values: Mapping[str, Encoded]
) -> dict[str, Any]:
    """The entries of ``state`` that are filled nowhere else: numbers, strings, lists, ``None``."""
    elsewhere = (Tensor, nn.Module, Optimizer, Stateful, dict)
    plain = (name for name, part in state.items() if not isinstance(part, elsewhere))
    return {name: decode(values[name], tensors) for name in plain}


def _flat(
    state: State, name: str, part: nn.Module | Optimizer, outlines: Outlines | None = None
) -> dict[str, Any]:
    owner = part if isinstance(part, nn.Module) else _owner(state, part)
    found: Mapping[str, Any] | None = outlines.again(part, owner) if outlines else None
    if found is None:
        found = _walk(part, owner)
        if outlines:
            outlines.learn(part, found, owner)
    return {f"{name}.{key}": leaf for key, leaf in found.items()}


def _walk(part: nn.Module | Optimizer, owner: nn.Module) -> Mapping[str, Any]:
    if isinstance(part, nn.Module):
        return get_model_state_dict(part)
    fresh = not part.state
    found = get_optimizer_state_dict(owner, part, options=_OPTIMIZER)
    if fresh:
        _undo_first_step(part)
    return found


def _undo_first_step(optimizer: Optimizer) -> None:
    """Torch lets an optimizer without state take a step to get one; leave no trace of it."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
    optimizer.state.clear()


def _plain(part: Any) -> Any:
    return part.state_dict() if isinstance(part, Stateful) else part


def _owner(state: State, optimizer: Optimizer) -> nn.Module:
    """The module of ``state`` whose parameters ``optimizer`` steps."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for part in state.values():
        if isinstance(part, nn.Module) and any(id(p) in stepped for p in part.parameters()):
            return part
    raise CheckpointError(
        "an optimizer comes without its model", fix="put the model into the same state"
    )


def _stable(
    name: str, part: nn.Module | Optimizer, found: Mapping[str, Any], outlines: Outlines | None
) -> set[str]:
    if isinstance(part, Optimizer):
        return {key for key, leaf in found.items() if isinstance(leaf, Tensor)}
    known = outlines.parameters(part) if outlines else None
    if known is not None:
        return {f"{name}.{key}" for key in known}
    # By address: wrappers change the names of parameters, and state dicts their identity.
    parameters = {_address(parameter) for parameter in part.parameters()}
    tensors = ((key, leaf) for key, leaf in found.items() if isinstance(leaf, Tensor))
    return {key for key, tensor in tensors if _address(tensor) in parameters}


def _address(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr()


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    found = sorted(keys)
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return [f"{what} {', '.join(found[:5])}{more}"] if found else []
