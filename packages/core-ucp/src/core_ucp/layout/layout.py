"""What every layout can do: place a tensor on a mesh, and tell its shape from what ranks hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_ucp.layout.mesh import Coordinate, Mesh
from core_ucp.layout.placement import Placement, Placements, crossed
from core_ucp.layout.runs import Picks, Runs, pick
from core_ucp.view.boxes import Table


@dataclass(frozen=True, eq=False)
class Holding:
    """What ranks hold while layouts divide a tensor, one after the other.

    Attributes:
        mesh: of the ranks.
        at: their coordinates, shape ``(ranks, axes)``.
        shape: of the whole tensor.
        dims: runs of every dimension, or its size where all ranks hold all of it.
        held: which of the ranks hold anything.
    """

    mesh: Mesh
    at: Table
    shape: tuple[int, ...]
    dims: list[Runs | int]
    held: NDArray[np.bool_]

    def along(self, axis: str) -> Table:
        """Positions of the ranks on an axis, shape ``(ranks,)``."""
        return self.at[:, self.mesh.position(axis)]

    def runs(self, dim: int) -> Runs:
        """What the ranks hold of a dimension.

        Raises:
            CheckpointError: when the tensor has no such dimension.
        """
        if not 0 <= dim < len(self.dims):
            raise CheckpointError(f"a tensor of shape {list(self.shape)} has no dimension {dim}")
        runs = self.dims[dim]
        return runs if isinstance(runs, Runs) else Runs.whole(runs, len(self.at))

    def with_runs(self, dim: int, runs: Runs) -> Holding:
        """The same with other runs of one dimension."""
        return replace(self, dims=[*self.dims[:dim], runs, *self.dims[dim + 1 :]])

    def pick(self, dim: int, picks: Picks) -> Holding:
        """The same after each rank has picked parts of a dimension."""
        return self.with_runs(dim, pick(self.runs(dim), picks))


@dataclass(frozen=True, eq=False)
class Locals:
    """Shapes of what ranks hold, from which layouts tell what there was before.

    Attributes:
        mesh: of the ranks.
        at: coordinates of those that hold something, shape ``(ranks, axes)``.
        shapes: of their tensors, shape ``(ranks, d)``.
    """

    mesh: Mesh
    at: Table
    shapes: Table = field(repr=False)

    def along(self, axis: str) -> Table:
        """Positions of the ranks on an axis, shape ``(ranks,)``."""
        return self.at[:, self.mesh.position(axis)]

    def extent(self, dim: int) -> Table:
        """Length of a dimension in the tensor of every rank, shape ``(ranks,)``.

        Raises:
            CheckpointError: when the tensors have no such dimension.
        """
        if not 0 <= dim < self.shapes.shape[1]:
            raise CheckpointError(
                f"a tensor of shape {self.shapes[0].tolist()} has no dimension {dim}"
            )
        return self.shapes[:, dim]

    def summed(self, values: Table, axis: str) -> Table:
        """For every rank, the sum over the ranks that differ from it on one axis only."""
        others = np.delete(self.at, self.mesh.position(axis), axis=1)
        if not others.shape[1]:
            return np.full_like(values, values.sum())
        group = np.unique(others, axis=0, return_inverse=True)[1].reshape(-1)
        return np.bincount(group, values)[group].astype(np.int64)

    def with_extent(self, dim: int, extent: Table | int) -> Locals:
        """The same with another length of one dimension."""
        shapes = self.shapes.copy()
        shapes[:, dim] = extent
        return replace(self, shapes=shapes)


class Fit(NamedTuple):
    """What the shapes of the tensors that coordinates hold say about the whole tensor.

    Attributes:
        layout: with sizes in the place of ``"stored"``.
        shape: of the whole tensor, without padding.
        order: the coordinates that hold something.
        placed: what they hold, in this order.
    """

    layout: Layout
    shape: tuple[int, ...]
    order: list[Coordinate]
    placed: Placements


class Layout(ABC):
    """How one tensor lies over the ranks of a mesh.

    Axes that a layout does not name hold replicas. Subclasses are frozen data classes that say how
    one step divides what ranks hold; steps are composed by :class:`core_ucp.layout.layouts.Chain`.
    """

    @abstractmethod
    def divide(self, holding: Holding) -> Holding:
        """What ranks hold after this step, from what they held before it."""

    @abstractmethod
    def undivide(self, found: Locals) -> Locals:
        """The shapes that there were before this step, from those after it."""

    def place_all(
        self, shape: Sequence[int], mesh: Mesh, ranks: Sequence[int] | Table | None = None
    ) -> Placements:
        """What ranks hold of a tensor.

        Args:
            shape: of the whole tensor, without padding.
            mesh: of the ranks.
            ranks: the ranks to tell about; all of the mesh unless given.

        Raises:
            CheckpointError: when the layout does not fit to the shape or to the mesh.
        """
        at = mesh.table if ranks is None else mesh.table[np.array(ranks, np.int64)]
        held = np.ones(len(at), np.bool_)
        start = Holding(mesh, at, tuple(shape), list(shape), held)
        done = self.divide(start)
        return crossed(done.dims, done.held)

    def place(self, shape: Sequence[int], mesh: Mesh, at: Coordinate) -> Placement:
        """What one coordinate holds of a tensor.

        Args:
            shape: of the whole tensor, without padding.
            mesh: of the ranks.
            at: the coordinate.

        Raises:
            CheckpointError: when the layout does not fit to the shape or to the mesh.
        """
        return self.place_all(shape, mesh, [mesh.rank(at)]).one(0)

    def holders(self, mesh: Mesh) -> list[Coordinate]:
        """The coordinates that hold something, even if it is of size zero."""
        return mesh.coordinates()

    def settle(self, found: Locals) -> tuple[Layout, Locals]:
        """This step with the sizes that were left to what is stored, and the shapes before it."""
        return self, self.undivide(found)

    def logical_shape(
        self, local_shapes: Mapping[Coordinate, Sequence[int]], mesh: Mesh
    ) -> tuple[int, ...]:
        """Shape of the whole tensor, see :meth:`fit`."""
        return self.fit(local_shapes, mesh).shape

    def fitted(
        self, local_shapes: Mapping[Coordinate, Sequence[int]], mesh: Mesh
    ) -> tuple[Layout, tuple[int, ...]]:
        """The layout with stored sizes and the shape of the whole tensor, see :meth:`fit`."""
        fit = self.fit(local_shapes, mesh)
        return fit.layout, fit.shape

    def fit(self, local_shapes: Mapping[Coordinate, Sequence[int]], mesh: Mesh) -> Fit:
        """The whole tensor, from the shapes of the tensors that coordinates hold.

        Args:
            local_shapes: by coordinate, for all coordinates that hold something.
            mesh: of the ranks.

        Raises:
            CheckpointError: when a coordinate is missing or one too many, and when no tensor makes
                these shapes under this layout.
        """
        order = self._complete(local_shapes, mesh)
        shapes = [tuple(local_shapes[at]) for at in order]
        odd = [row for row, shape in enumerate(shapes) if len(shape) != len(shapes[0])]
        if odd:
            raise CheckpointError(
                f"{mesh.words(order[0])} holds {list(shapes[0])} and"
                f" {mesh.words(order[odd[0]])} holds {list(shapes[odd[0]])}",
                why=f"these are no parts of one tensor under {self}",
            )
        table = np.array(shapes, np.int64).reshape(len(shapes), len(shapes[0]))
        at = np.array(order, np.int64).reshape(len(order), len(mesh.names))
        layout, before = self.settle(Locals(mesh, at, table))
        whole = tuple(int(size) for size in before.shapes.max(axis=0, initial=0))
        placed = layout.place_all(whole, mesh, mesh.numbers(at))
        expected = placed.shapes
        wrong = (expected != table).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise CheckpointError(
                f"{mesh.words(order[row])} holds {list(shapes[row])}",
                why=f"a tensor of {list(whole)} under {layout} gives it {expected[row].tolist()}",
                fix="correct the layout, or the sizes of the mesh",
            )
        return Fit(layout, whole, order, placed)

    def _complete(
        self, local_shapes: Mapping[Coordinate, Sequence[int]], mesh: Mesh
    ) -> list[Coordinate]:
        order = self.holders(mesh)
        if not order:
            raise CheckpointError(f"nobody holds a tensor under {self}")
        missing = [at for at in order if at not in local_shapes]
        if missing:
            raise CheckpointError(
                f"nothing is there of {mesh.words(missing[0])}",
                why=f"under {self}, {len(order)} coordinates of {mesh} hold a part,"
                f" and {len(missing)} are missing",
            )
        known = set(order)
        foreign = [at for at in local_shapes if at not in known]
        if foreign:
            raise CheckpointError(
                f"the coordinate {list(foreign[0])} holds something",
                why=f"under {self}, it should not: {len(order)} coordinates of {mesh} do",
            )
        return order
