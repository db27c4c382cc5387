"""The grid of ranks that wrote a checkpoint: named axes, coordinates, and the order of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from core.errors import CheckpointError, closest
from core_ucp.view.boxes import Table

_MOST_RANKS = 2**20
"""Ranks of a mesh: what a file says of its mesh must not fill the memory with coordinates."""

Coordinate = tuple[int, ...]
"""Position of a rank on every axis of a mesh, in the order of the axes."""


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid.

    Args:
        axes: sizes by name, such as ``{"pp": 2, "tp": 4}``.
        order: names from the axis whose coordinate changes slowest with the rank to the one that
            changes fastest; the order of ``axes`` unless given.

    Raises:
        CheckpointError: for an axis without a rank, more ranks than any machine has, and an order
            of other axes.

    Example:
        >>> mesh = Mesh({"tp": 2, "pp": 3}, order=("pp", "tp"))
        >>> mesh.rank((1, 2)), mesh.coordinate(3)
        (5, (1, 1))
    """

    axes: Mapping[str, int] = field(hash=False)
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        axes = dict(self.axes)
        order = tuple(self.order) or tuple(axes)
        for name, size in axes.items():
            if not name or size < 1:
                raise CheckpointError(f"axis {name!r} of a mesh has {size} ranks")
        if math.prod(axes.values()) > _MOST_RANKS:
            raise CheckpointError(f"a mesh of {list(axes.values())} has too many ranks")
        if sorted(order) != sorted(axes):
            raise CheckpointError(
                f"the order {list(order)} of a mesh does not name each axis of {list(axes)} once"
            )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "order", order)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.axes.values())

    @cached_property
    def ranks(self) -> int:
        """Number of ranks."""
        return math.prod(self.axes.values())

    @cached_property
    def table(self) -> Table:
        """Coordinates of all ranks, by rank, shape ``(ranks, axes)``."""
        sizes = [self.axes[name] for name in self.order]
        steps = np.indices(sizes, np.int64).reshape(len(sizes), -1)
        columns = [steps[self.order.index(name)] for name in self.axes]
        return np.stack(columns, axis=1) if columns else np.zeros((1, 0), np.int64)

    def size(self, axis: str) -> int:
        """Number of ranks along an axis.

        Raises:
            CheckpointError: when the mesh has no such axis.
        """
        return self.axes[self._known(axis)]

    def position(self, axis: str) -> int:
        """Place of an axis in coordinates.

        Raises:
            CheckpointError: when the mesh has no such axis.
        """
        return self.names.index(self._known(axis))

    def at(self, **position: int) -> Coordinate:
        """Coordinate with the given positions, and zero on all other axes.

        Raises:
            CheckpointError: when the mesh has no such axis, or the axis no such position.
        """
        for axis, index in position.items():
            if not 0 <= index < self.size(axis):
                raise CheckpointError(f"{axis}={index} is outside of {self}")
        return tuple(position.get(name, 0) for name in self.axes)

    def coordinates(self) -> list[Coordinate]:
        """Coordinates of all ranks, the last axis changing fastest."""
        return list(product(*(range(size) for size in self.shape)))

    def numbers(self, at: Table) -> Table:
        """Ranks at coordinates that the mesh has, in a table of shape ``(n, axes)``."""
        rank = np.zeros(len(at), np.int64)
        for name in self.order:
            rank = rank * self.axes[name] + at[:, self.names.index(name)]
        return rank

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a rank.

        Raises:
            CheckpointError: when there is no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise CheckpointError(f"rank {rank} is outside of {self}")
        return tuple(int(index) for index in self.table[rank])

    def rank(self, at: Sequence[int]) -> int:
        """Rank at a coordinate.

        Raises:
            CheckpointError: when the mesh has no such coordinate.
        """
        inside = len(at) == len(self.axes) and all(
            0 <= index < size for index, size in zip(at, self.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(f"the coordinate {list(at)} is outside of {self}")
        place = dict(zip(self.axes, at, strict=True))
        rank = 0
        for name in self.order:
            rank = rank * self.axes[name] + place[name]
        return rank

    def words(self, at: Sequence[int]) -> str:
        """A coordinate for messages, such as ``pp=0 tp=3``."""
        return " ".join(f"{name}={index}" for name, index in zip(self.axes, at, strict=True)) or "0"

    def __str__(self) -> str:
        return f"the mesh {' x '.join(f'{name}={size}' for name, size in self.axes.items()) or '1'}"

    def _known(self, axis: str) -> str:
        if axis not in self.axes:
            raise CheckpointError(
                f"{self} has no axis {axis!r}{closest(axis, self.names)}",
                fix="name one of its axes, or give the mesh this axis",
            )
        return axis
