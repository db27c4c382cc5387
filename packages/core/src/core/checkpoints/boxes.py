"""Reading a box of a stored tensor into a box of a live one, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.storage import ByteSource

BLOCK = 8 * 2**20
"""Bytes that are read at once where the target is not contiguous."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a row-major tensor lies: file, byte offset, dtype and shape."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def fill(target: Tensor, source: ByteSource, stored: StoredTensor, start: Sequence[int]) -> None:
    """Read ``target.shape`` elements at index ``start`` of a stored tensor into ``target``.

    Memory beside ``target`` is one block, or one row where a row is larger.

    Args:
        target: tensor that is filled; any strides, dtype and device.
        source: where the bytes are.
        stored: where the tensor lies in ``source``.
        start: first index of the box in every dimension.

    Raises:
        CheckpointError: when the stored tensor does not cover the box, or the file ends early.
    """
    ends = (first + size for first, size in zip(start, target.shape, strict=True))
    if len(stored.shape) != target.dim() or any(
        end > size for end, size in zip(ends, stored.shape, strict=False)
    ):
        raise CheckpointError(
            f"{stored.file} is damaged",
            why=f"a tensor of {list(target.shape)} is needed, and {list(stored.shape)} is stored",
        )
    if target.numel() == 0:
        return
    width = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    first = stored.offset + (start[0] * width if stored.shape else 0)
    whole_rows = stored.shape[1:] == tuple(target.shape[1:])
    same = target.device.type == "cpu" and target.dtype == stored.dtype
    if whole_rows and same and target.is_contiguous():
        source.read_into(stored.file, first, memory(target))
        return
    if not stored.shape:
        block = torch.empty((), dtype=stored.dtype)
        source.read_into(stored.file, first, memory(block))
        target.copy_(block)
        return
    rows = max(1, BLOCK // max(1, width))
    for row in range(0, target.shape[0], rows):
        part = target[row : row + rows]
        block = torch.empty((part.shape[0], *stored.shape[1:]), dtype=stored.dtype)
        source.read_into(stored.file, first + row * width, memory(block))
        for dim in range(1, len(stored.shape)):
            block = block.narrow(dim, start[dim], target.shape[dim])
        part.copy_(block)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    view: memoryview = flat.numpy().data
    return view
