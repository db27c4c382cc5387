"""Bytes as tensors and tensors as bytes, of any dtype and without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def span(tensor: Tensor, begin: int, size: int) -> Tensor:
    """Bytes of a tensor's storage as a tensor of their own, without a copy."""
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    with torch.no_grad():
        return data.set_(tensor.untyped_storage(), begin, (size,), (1,))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor of any dtype, without a copy."""
    return span(tensor, int(tensor.storage_offset()) * tensor.itemsize, tensor.nbytes)


def typed(data: Tensor, begin: int, dtype: torch.dtype, shape: Any, stride: Any) -> Tensor:
    """A view of bytes as a tensor; of a copy where they are not aligned to its elements.

    Args:
        data: uint8 of shape (n,), contiguous.
        begin: first byte of the view in ``data``.
        dtype: its dtype.
        shape: its shape.
        stride: its strides in elements.
    """
    offset = data.storage_offset() + begin
    if offset % dtype.itemsize:
        data = data[begin:].clone()
        offset = 0
    empty = torch.empty(0, dtype=dtype, device=data.device)
    return empty.set_(data.untyped_storage(), offset // dtype.itemsize, shape, stride)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers (as complex for 16 bytes), which every operator moves unchanged."""
    dtype = _BITS[tensor.itemsize]
    empty = torch.empty(0, dtype=dtype, device=tensor.device)
    with torch.no_grad():
        return empty.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides reach every element of a block of memory exactly once."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True
