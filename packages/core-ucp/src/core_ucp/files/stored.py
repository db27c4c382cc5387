"""What stands in the place of tensors and objects of a pickle that is not run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from core_ucp.view.boxes import Boxes
from core_ucp.view.pieces import Pieces, row_major
from core_ucp.view.view import Atom, Relation


class _Checked:
    """Made from checked numbers: a pickle may not fill it with others, as it may other objects."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a tensor is no object with a state")


@dataclass(frozen=True)
class Storage(_Checked):
    """Bytes in a file that tensors look into.

    Attributes:
        file: index in the table of files.
        offset: first byte.
        nbytes: length.
        dtype: of its elements.
    """

    file: int
    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Located(_Checked):
    """A tensor by reference.

    Attributes:
        storage: the bytes that it looks into; tensors that share memory share it.
        dtype: of its elements.
        shape: of the tensor.
        stride: elements of the storage from one element to the next in every dimension.
        first: element of the storage that is its first.
    """

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def file(self) -> int:
        """Index of its file in the table of files."""
        return self.storage.file

    @property
    def offset(self) -> int:
        """Byte of its first element in its file."""
        return self.storage.offset + self.first * self.dtype.itemsize

    @cached_property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in row-major order."""
        dense = row_major(self.shape, 1)
        steps = zip(self.shape, self.stride, dense, strict=True)
        return self.numel == 0 or all(have == want for size, have, want in steps if size > 1)

    def pieces(self) -> Pieces:
        """The whole tensor as one piece."""
        dims = len(self.shape)
        stride = np.array(self.stride, np.int64).reshape(1, dims) * self.dtype.itemsize
        place = np.array([[self.file], [self.offset]], np.int64)
        return Pieces(Boxes.whole(self.shape), place[0], place[1], stride)

    def atom(self, relation: Relation = "elementwise") -> Atom:
        """The tensor as an atom."""
        return Atom(self.shape, self.dtype, self.pieces(), relation)


@dataclass
class Inert:
    """What a file says of an object whose class is not imported.

    Attributes:
        kind: dotted name of its class.
        arguments: that it would be made with.
        state: what it would be filled with, such as its attributes.
        items: what would be appended to it, or (key, value) pairs put into it.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Keep an item of a list."""
        self.items.append(item)

    def extend(self, items: Sequence[Any]) -> None:
        """Keep items of a list."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __hash__(self) -> int:
        return id(self)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.state.get(name, default) if isinstance(self.state, Mapping) else default
