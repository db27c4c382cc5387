"""Layouts that cut nothing: who holds a tensor at all, and compositions of layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout.layout import Holding, Layout, Locals
from core_ucp.layout.mesh import Coordinate, Mesh


@dataclass(frozen=True)
class Replicate(Layout):
    """Every rank holds the whole tensor."""

    def divide(self, holding: Holding) -> Holding:
        return holding

    def undivide(self, found: Locals) -> Locals:
        return found


@dataclass(frozen=True)
class Owner(Layout):
    """Only some coordinates hold the tensor, such as those of one pipeline stage.

    Args:
        at: position on every axis that matters, or several positions that hold replicas; such as
            ``{"pp": 2}``, or ``{"pp": (0, 3)}`` for embeddings that the first and the last share.
    """

    at: Mapping[str, int | tuple[int, ...]] = field(hash=False)

    def __post_init__(self) -> None:
        # One form of what can be written in two, so that equal layouts compare equal.
        object.__setattr__(self, "at", {axis: _single(where) for axis, where in self.at.items()})

    def divide(self, holding: Holding) -> Holding:
        held = holding.held.copy()
        for axis, where in self.at.items():
            size = holding.mesh.size(axis)
            if not all(0 <= index < size for index in _several(where)):
                raise CheckpointError(f"{self} names a position outside of {holding.mesh}")
            held &= np.isin(holding.along(axis), _several(where))
        return replace(holding, held=held)

    def undivide(self, found: Locals) -> Locals:
        return found

    def holders(self, mesh: Mesh) -> list[Coordinate]:
        places = [(mesh.position(axis), _several(where)) for axis, where in self.at.items()]
        return [at for at in mesh.coordinates() if all(at[axis] in where for axis, where in places)]


@dataclass(frozen=True)
class Alias(Layout):
    """The tensor is another one under a second name; nothing of its own is stored.

    Args:
        of: name of the parameter that it is; groups of a rule's pattern can be in it.
    """

    of: str

    def divide(self, holding: Holding) -> Holding:
        raise self._refusal()

    def undivide(self, found: Locals) -> Locals:
        raise self._refusal()

    def holders(self, mesh: Mesh) -> list[Coordinate]:
        raise self._refusal()

    def _refusal(self) -> CheckpointError:
        return CheckpointError(f"an alias of {self.of} has no elements of its own")


@dataclass(frozen=True)
class Average(Layout):
    """Every rank along an axis trains a copy of its own, and their mean is the parameter.

    The only form that loses something: refused wherever the user has not opted in.

    Args:
        axis: of the mesh.
    """

    axis: str

    def divide(self, holding: Holding) -> Holding:
        holding.mesh.position(self.axis)
        return holding

    def undivide(self, found: Locals) -> Locals:
        found.mesh.position(self.axis)
        return found


@dataclass(frozen=True)
class Refused(Layout):
    """Who wrote the tensor says that its layout cannot be told.

    Args:
        reason: that was given.
    """

    reason: str

    def divide(self, holding: Holding) -> Holding:
        raise CheckpointError("the layout of this parameter is not known", why=self.reason)

    def undivide(self, found: Locals) -> Locals:
        raise CheckpointError("the layout of this parameter is not known", why=self.reason)


@dataclass(frozen=True)
class Chain(Layout):
    """Layouts one after the other: each divides what the one before it has left to a rank.

    Args:
        layouts: the outermost first, such as ``(Expert(0, "ep"), Shard(2, "tp"))``.
    """

    layouts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        # One form of what can be written in several, so that equal layouts compare equal.
        flat = tuple(step for layout in self.layouts for step in steps(layout))
        object.__setattr__(self, "layouts", flat)

    def divide(self, holding: Holding) -> Holding:
        for layout in self.layouts:
            holding = layout.divide(holding)
        return holding

    def undivide(self, found: Locals) -> Locals:
        return self.settle(found)[1]

    def settle(self, found: Locals) -> tuple[Layout, Locals]:
        settled: list[Layout] = []
        for layout in reversed(self.layouts):
            step, found = layout.settle(found)
            settled.insert(0, step)
        return Chain(tuple(settled)), found

    def holders(self, mesh: Mesh) -> list[Coordinate]:
        everybody = mesh.coordinates()
        held = [set(owner.holders(mesh)) for owner in self.layouts if isinstance(owner, Owner)]
        return [at for at in everybody if all(at in some for some in held)] if held else everybody


def steps(layout: Layout) -> tuple[Layout, ...]:
    """The layouts of a composition, or the only one."""
    return layout.layouts if isinstance(layout, Chain) else (layout,)


def _several(where: int | tuple[int, ...]) -> tuple[int, ...]:
    return (where,) if isinstance(where, int) else where


def _single(where: int | Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(where, int):
        return where
    places = tuple(sorted(set(where)))
    return places[0] if len(places) == 1 else places
