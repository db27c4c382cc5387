"""From stored bytes and the records of a tree back to tensors that share what they shared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from core_fastpersist.files.header import READABLE, Entry
from core_fastpersist.files.leaves import Record
from core_fastpersist.files.parsing import whole
from core_fastpersist.files.scalars import Encoded, dtype_called
from core_fastpersist.files.views import bits, is_dense, row_major, typed


class Restorer:
    """Makes tensors from records; the same record gives the same object.

    Args:
        entries: the stored tensors by name.
        data: gives the bytes of one, uint8 of shape (n,), always the same memory.
    """

    def __init__(self, entries: Mapping[str, Entry], data: Callable[[str], Tensor]) -> None:
        self._entries = entries
        self._data = data
        self._made: dict[str, Any] = {}

    def leaf(self, value: Encoded) -> Any:
        """The tensor, parameter or array of an encoded leaf.

        Raises:
            ValueError, KeyError, TypeError: for a record that leads out of the stored bytes.
        """
        key = json.dumps(value)
        if key not in self._made:
            self._made[key] = self._make(value)
        return self._made[key]

    def tensor(self, record: Record) -> Tensor:
        """The tensor of a record.

        Raises:
            ValueError, KeyError, TypeError: for a record that leads out of the stored bytes.
        """
        entry, dtype, shape = described(self._entries, record)
        if "view" in record:
            return self._view(entry, dtype, shape, record)
        plain = typed(self._data(entry.name), 0, dtype, shape, row_major(shape))
        if "expanded" in record:
            return _expanded(plain, [whole(dim) for dim in record["expanded"]])
        return strided(plain, record)

    def _make(self, value: Encoded) -> Any:
        if "array" in value:
            return self.leaf(value["array"]).cpu().numpy()
        if "parameter" in value:
            wanted = value["requires_grad"]
            if not isinstance(wanted, bool):
                raise TypeError("requires_grad is true or false")
            return torch.nn.Parameter(self.leaf(value["parameter"]), requires_grad=wanted)
        return self.tensor(value)

    def _view(
        self, entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], record: Record
    ) -> Tensor:
        offset, stride = whole(record["offset"]), _sizes(record["stride"])
        steps = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        needed = (steps + 1) * dtype.itemsize if math.prod(shape) else 0
        if offset + needed > entry.nbytes or offset % dtype.itemsize:
            raise ValueError(f"a view leads out of {entry.name!r}")
        return typed(self._data(entry.name), offset, dtype, shape, stride)


def described(
    entries: Mapping[str, Entry], record: Record
) -> tuple[Entry, torch.dtype, tuple[int, ...]]:
    """The stored tensor that a record leads to, and dtype and shape of what it makes of it.

    Raises:
        ValueError, KeyError, TypeError: for ones that do not fit the stored bytes.
    """
    name = record["view"] if "view" in record else record["tensor"]
    if name not in entries:
        raise ValueError(f"its tree names {str(name)[:40]!r}, which it does not have")
    entry = entries[name]
    if "dtype" not in record:
        return entry, READABLE[entry.dtype], entry.shape
    dtype, shape = dtype_called(record["dtype"]), _sizes(record["shape"])
    if "view" not in record and math.prod(shape) * dtype.itemsize > entry.nbytes:
        raise ValueError(f"{name!r} is too short for {list(shape)} of {dtype}")
    return entry, dtype, shape


def strided(plain: Tensor, record: Record) -> Tensor:
    """A row-major tensor in the layout that its record tells.

    Raises:
        ValueError, TypeError: for strides that are no layout of it.
    """
    if "stride" not in record:
        return plain
    stride = _sizes(record["stride"])
    if not is_dense(plain.shape, stride):
        raise ValueError(f"strides {list(stride)} are no layout of {list(plain.shape)}")
    out = torch.empty(plain.nbytes, dtype=torch.uint8, device=plain.device)
    out = typed(out, 0, plain.dtype, plain.shape, stride)
    bits(out).copy_(bits(plain))
    return out


def _expanded(plain: Tensor, dims: list[int]) -> Tensor:
    once = bits(plain)
    for dim in dims:
        if dim >= once.dim():
            raise ValueError(f"dimension {dim} of {list(plain.shape)} was expanded")
        once = once.narrow(dim, 0, min(1, once.shape[dim]))
    once = once.clone(memory_format=torch.contiguous_format)
    stride = [0 if dim in dims else step for dim, step in enumerate(once.stride())]
    data = once.new_empty(0, dtype=torch.uint8)
    data.set_(once.untyped_storage())
    return typed(data, 0, plain.dtype, plain.shape, stride)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list of sizes")
    return tuple(whole(size) for size in value)
