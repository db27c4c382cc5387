"""Pickles of plain values and of tensors that have no bytes yet, as ``torch.save`` writes them.

Classes are named and never imported: a file can hold objects of a framework that is not installed.
Nothing is shared between values, so that the pickle of a value does not depend on its place.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.checkpoints.blobs import STORAGES
from core.errors import CheckpointError

_STORAGES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
"""Storage classes by which torch names dtypes; the dtypes that came later have none."""


@dataclass(frozen=True, eq=False)
class Room:
    """A tensor of a file to be made, whose bytes are written later.

    The same object at two places of a tree stands for one tensor under two names.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Reference:
    """A class or another global, by its names."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What a global returns for some arguments."""

    function: Reference
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Instance:
    """An object of a class that was made without a call of ``__init__``."""

    kind: Reference
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A part of a tree that is pickled already; see :func:`encode`."""

    data: bytes


def encode(value: Any) -> Encoded:
    """Pickle a value without tensors once, that stands in many files."""
    return Encoded(_Pickler(_no_tensors).of(value, "value"))


def pickled(tree: Any) -> tuple[bytes, list[Room | torch.Tensor]]:
    """Pickle a tree.

    Args:
        tree: numbers, strings, tensors, :class:`Room` and the like, lists, tuples and mappings.

    Returns:
        the bytes of ``data.pkl``, and the tensors in the order of their storage numbers.

    Raises:
        CheckpointError: for a value of another type, naming its place.
    """
    found: dict[int, int] = {}
    tensors: list[Room | torch.Tensor] = []

    def number(tensor: Room | torch.Tensor) -> int:
        if id(tensor) not in found:
            found[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return found[id(tensor)]

    return b"\x80\x02" + _Pickler(number).of(tree, "") + b".", tensors


def _no_tensors(tensor: Room | torch.Tensor) -> int:
    raise CheckpointError("a tensor cannot be pickled beforehand")


class _Pickler:
    """Protocol 2, without the memo.

    Args:
        number: gives the number of a tensor's storage.
    """

    def __init__(self, number: Callable[[Room | torch.Tensor], int]) -> None:
        self._number = number

    def of(self, value: Any, place: str) -> bytes:
        """The pickle of a value; ``place`` names it in errors."""
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                return _integer(int(value))
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                data = value.encode("utf-8", "surrogatepass")
                return b"X" + struct.pack("<I", len(data)) + data
            case Encoded():
                return value.data
            case Room() | torch.Tensor():
                return self._tensor(value)
            case _:
                return self._collection(value, place)

    def _collection(self, value: Any, place: str) -> bytes:
        match value:
            case Reference():
                return f"c{value.module}\n{value.name}\n".encode()
            case Call():
                return self.of(value.function, place) + self.of(value.arguments, place) + b"R"
            case Instance():
                return self.of(value.kind, place) + b")\x81" + self.of(value.state, place) + b"b"
            case torch.dtype():
                return self.of(Reference("torch", str(value).removeprefix("torch.")), place)
            case torch.Size():
                return self.of(Call(Reference("torch", "Size"), (tuple(value),)), place)
            case tuple():
                return b"(" + self._items(enumerate(value), place) + b"t"
            case list():
                return b"](" + self._items(enumerate(value), place) + b"e"
            case Mapping():
                ordered = isinstance(value, OrderedDict)
                empty = self.of(Call(Reference("collections", "OrderedDict")), place)
                return (empty if ordered else b"}") + b"(" + self._pairs(value, place) + b"u"
            case _:
                raise CheckpointError(
                    f"{place or 'value'} is a {type(value).__name__}, which this file cannot hold",
                    why="it holds tensors, numbers, strings, and lists and mappings of them",
                )

    def _items(self, items: Iterable[tuple[int, Any]], place: str) -> bytes:
        return b"".join([self.of(item, f"{place}.{index}") for index, item in items])

    def _pairs(self, value: Mapping[Any, Any], place: str) -> bytes:
        return b"".join(
            [
                self.of(key, place) + self.of(item, f"{place}.{key}" if place else str(key))
                for key, item in value.items()
            ]
        )

    def _tensor(self, tensor: Room | torch.Tensor) -> bytes:
        shape = tuple(tensor.shape)
        storage = _STORAGES.get(tensor.dtype)
        numel = math.prod(shape)
        named = (
            "storage",
            Reference("torch", storage)
            if storage
            else Reference("torch.storage", "UntypedStorage"),
            str(self._number(tensor)),
            "cpu",
            numel if storage else numel * tensor.dtype.itemsize,
        )
        rebuild = Reference("torch._utils", f"_rebuild_tensor_v{2 if storage else 3}")
        persistent = Encoded(self.of(named, "") + b"Q")
        rest: tuple[Any, ...] = (0, shape, _strides(shape), False, OrderedDict())
        arguments = (persistent, *rest, *(() if storage else (tensor.dtype,)))
        return self.of(Call(rebuild, arguments), "")


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise CheckpointError(f"a number of {value.bit_length()} bits is too large for this file")
    return b"\x8a" + bytes([len(data)]) + data


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one to the next in every dimension, as torch counts them for empty tensors."""
    return tuple(math.prod(max(1, size) for size in shape[dim + 1 :]) for dim in range(len(shape)))
