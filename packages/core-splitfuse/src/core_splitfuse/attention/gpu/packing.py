"""Arrays of a pass behind each other in one tensor, so that one copy brings them to the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from core_splitfuse.attention.gpu.atoms import Numbers

_ALIGNED: Final = 4
"""Numbers: kernels load sixteen bytes at once."""


def packed(arrays: Mapping[str, Numbers], *, pinned: bool) -> Tensor:
    """One int32 tensor on the host; pinned memory is used again only when its copy is done."""
    sizes = [_aligned(array.size) for array in arrays.values()]
    host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
    numbers = host.numpy()
    at = 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        numbers[at : at + array.size] = array.reshape(-1)
        at += size
    return host


def views_of(memory: Tensor, arrays: Mapping[str, Numbers]) -> dict[str, Tensor]:
    """The arrays in a copy of what :func:`packed` made of them."""
    views: dict[str, Tensor] = {}
    at = 0
    for name, array in arrays.items():
        views[name] = memory[at : at + array.size].view(array.shape)
        at += _aligned(array.size)
    return views


def padded(array: Numbers, size: int, fill: int) -> Numbers:
    """Filled up to ``size`` rows."""
    made = np.full((size, *array.shape[1:]), fill, np.int32)
    made[: len(array)] = array
    return made


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
