"""Adoption: parameters and optimizer state moved, once, into the image of their file.

Each checkpoint is then written from where the tensors lie, without a copy (FastPersist,
arXiv 2406.13768, takes one through a buffer). Nothing has to know that they were moved: ``save`` looks
at addresses, each time anew, so a tensor that was replaced since costs a copy and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.errors import CheckpointError
from core_fastpersist.direct.memory import PAGE, pages

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Adopted:
    """What was moved.

    Args:
        nbytes: bytes of the tensors that lie in one stretch now.
        tensors: how many these are.
        left: names of tensors that stay where they are, with the reason.
    """

    nbytes: int
    tensors: int
    left: dict[str, str]


def adopt(*parts: nn.Module | Optimizer) -> Adopted:
    """Move the tensors of models and optimizers into one aligned stretch of memory.

    Parameters and saved buffers keep their identity, and an optimizer's state is replaced in its place, so
    training goes on as before. Adopt a model before it is wrapped by DDP, and an optimizer after
    its first step, when it has state.

    Args:
        parts: modules and optimizers on the CPU.

    Returns:
        what was moved. The memory lives as long as the tensors do.

    Raises:
        CheckpointError: when one of the parts is no module and no optimizer.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> adopted = adopt(model)
        >>> adopted.tensors, adopted.nbytes, adopted.left
        (2, 16640, {})
    """
    found: dict[int, tuple[str, Tensor, _Slot]] = {}
    for part in parts:
        for name, tensor, slot in _tensors(part):
            found.setdefault(id(tensor), (name, tensor, slot))
    left: dict[str, str] = {}
    moved = []
    for name, tensor, slot in found.values():
        reason = _reason(tensor)
        if reason:
            left[name] = reason
        elif tensor.nbytes:
            moved.append((tensor, slot))
    # Widest elements first: then no tensor needs padding before it, and a file allows none.
    moved.sort(key=lambda item: -item[0].itemsize)
    total = sum(tensor.nbytes for tensor, _ in moved)
    memory = pages(-(-total // PAGE) * PAGE)
    position = 0
    with torch.no_grad():
        for tensor, slot in moved:
            flat = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=position)
            place = flat.view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)
            slot.put(tensor, place)
            position += tensor.nbytes
    return Adopted(total, len(moved), left)


class _Slot:
    """Where a tensor hangs: a parameter or buffer is changed itself."""

    def put(self, tensor: Tensor, place: Tensor) -> None:
        tensor.data = place


@dataclass(frozen=True)
class _StateSlot(_Slot):
    """A tensor in the state of an optimizer."""

    state: dict[str, object]
    key: str

    def put(self, tensor: Tensor, place: Tensor) -> None:
        self.state[self.key] = place


def _tensors(part: nn.Module | Optimizer) -> Iterator[tuple[str, Tensor, _Slot]]:
    if isinstance(part, nn.Module):
        saved = part.state_dict().keys()
        for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
            if name in saved:  # anything else would leave a hole in the file
                yield name, tensor, _Slot()
        return
    if not isinstance(cast(object, part), Optimizer):
        raise CheckpointError(f"cannot adopt a {type(part).__name__}", fix="pass the module itself")
    for index, state in enumerate(part.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"state.{index}.{key}", value, _StateSlot(state, key)


def _reason(tensor: Tensor) -> str:
    """Why a tensor cannot be moved, or an empty string."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"it is a {type(tensor).__name__}"
    if tensor.device != _CPU:
        return f"it is on {tensor.device}"
    if not tensor.is_contiguous():
        return "its elements do not lie row by row"
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        return "it is a part of a larger tensor"
    return ""
