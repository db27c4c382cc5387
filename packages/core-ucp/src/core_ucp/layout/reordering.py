"""Lenses that move the elements of a parameter, or say how large they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout import moves
from core_ucp.layout.lens import TWIN, Lens, Parameter, Parameters, changed, replaced
from core_ucp.layout.names import Pattern
from core_ucp.view.boxes import Table
from core_ucp.view.view import Atom

GRADIENTS = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "momentum": 1,
    "square_avg": 2,
    "grad_avg": 1,
    "sum": 2,
}
"""How many gradients are multiplied in a state. A weight that is twice as large has gradients that
are half as large."""


@dataclass(frozen=True)
class _InPlace(Lens):
    match: str
    regex: bool = field(default=False, kw_only=True)

    def change(self, parameters: Parameters) -> Parameters:
        pattern = Pattern(self.match, self.regex)
        old = [name for name in parameters if pattern.groups(name) is not None]
        new = [self._changed(parameters[name]) for name in old]
        return replaced(parameters, [[name] for name in old], new)

    def _changed(self, parameter: Parameter) -> Parameters:
        return changed(
            [parameter],
            [parameter.name],
            lambda atoms, role: [self._atom(atoms[0], role, parameter.name)],
        )

    @abstractmethod
    def _atom(self, atom: Atom, role: str, name: str) -> Atom: ...


@dataclass(frozen=True)
class Permute(_InPlace):
    """Equal blocks of a dimension in another order.

    Args:
        match: pattern of names.
        dim: that is made of blocks.
        order: old index of every new block.
        regex: whether ``match`` is a regular expression.
    """

    dim: int
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.order or sorted(self.order) != list(range(len(self.order))):
            raise CheckpointError(f"{list(self.order)} does not name each block once")

    def inverse(self) -> Permute:
        return replace(self, order=_inverse(self.order))

    def _atom(self, atom: Atom, role: str, name: str) -> Atom:
        return permuted(atom, self.dim, self.order, name)


@dataclass(frozen=True)
class QueryGroups(_InPlace):
    """Rows of queries, keys and values, from one behind the other to one group after the other.

    Megatron's ``linear_qkv`` holds for every query group its query heads, its key, and its value;
    most others hold all queries, all keys, and all values.

    Args:
        match: pattern of names of joined weights and biases.
        heads: number of query heads.
        groups: number of query groups, which is that of key and of value heads.
        dim: of the rows.
        back: the other way round: from groups to all queries, keys and values.
        regex: whether ``match`` is a regular expression.
    """

    heads: int
    groups: int
    dim: int = 0
    back: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1 or self.heads < 1 or self.heads % self.groups:
            raise CheckpointError(f"{self.heads} heads do not make {self.groups} query groups")

    @property
    def order(self) -> tuple[int, ...]:
        """Old index of every head's rows."""
        each = self.heads // self.groups
        order = tuple(
            head
            for group in range(self.groups)
            for head in (
                *range(group * each, (group + 1) * each),
                self.heads + group,
                self.heads + self.groups + group,
            )
        )
        return _inverse(order) if self.back else order

    def inverse(self) -> QueryGroups:
        return replace(self, back=not self.back)

    def _atom(self, atom: Atom, role: str, name: str) -> Atom:
        return permuted(atom, self.dim, self.order, name)


@dataclass(frozen=True)
class Rotary(_InPlace):
    """Rows of rotary heads, from two halves to pairs.

    Rotary embeddings rotate element ``j`` of a head with element ``j + d/2`` in Hugging Face's
    models, and with its neighbour in the weights of the original LLaMA and of GPT-J.

    Args:
        match: pattern of names.
        heads: number of heads.
        dim: of the rows.
        back: the other way round: from pairs to halves.
        regex: whether ``match`` is a regular expression.
    """

    heads: int
    dim: int = 0
    back: bool = False

    def inverse(self) -> Rotary:
        return replace(self, back=not self.back)

    def _atom(self, atom: Atom, role: str, name: str) -> Atom:
        rows = atom.shape[self.dim] if len(atom.shape) > self.dim else 0
        if self.heads < 1 or rows == 0 or rows % (2 * self.heads):
            raise CheckpointError(
                f"{name} is of {list(atom.shape)}", why=f"it has no {self.heads} rotary heads"
            )
        table = np.arange(rows).reshape(self.heads, 2, -1).transpose(0, 2, 1).reshape(-1)
        order = np.argsort(table) if self.back else table
        return permuted(atom, self.dim, order.tolist(), name)


@dataclass(frozen=True)
class Transpose(_InPlace):
    """Dimensions in another order.

    Args:
        match: pattern of names.
        order: old dimension of every new one; ``(1, 0)`` exchanges rows and columns.
        regex: whether ``match`` is a regular expression.
    """

    order: tuple[int, ...] = (1, 0)

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise CheckpointError(f"{list(self.order)} does not name each dimension once")

    def inverse(self) -> Transpose:
        return replace(self, order=_inverse(self.order))

    def _atom(self, atom: Atom, role: str, name: str) -> Atom:
        if len(atom.shape) != len(self.order):
            raise CheckpointError(
                f"{name} is of {list(atom.shape)}", why=f"it cannot be transposed by {self.order}"
            )
        return moves.transposed(atom, self.order)


@dataclass(frozen=True)
class Scale(_InPlace):
    """Elements times a power of two, which loses nothing.

    The optimizer's states follow: those of gradients change the other way round.

    Args:
        match: pattern of names.
        power: of two.
        regex: whether ``match`` is a regular expression.
    """

    power: int

    def inverse(self) -> Scale:
        return replace(self, power=-self.power)

    def _atom(self, atom: Atom, role: str, name: str) -> Atom:
        if role in ("", TWIN):
            return replace(atom, exponent=atom.exponent + self.power)
        if role not in GRADIENTS:
            raise CheckpointError(
                f"{name} cannot be scaled",
                why=f"what its state {role!r} becomes then is not known",
                fix=f"known are {', '.join(GRADIENTS)}",
            )
        return replace(atom, exponent=atom.exponent - GRADIENTS[role] * self.power)


def permuted(atom: Atom, dim: int, order: Sequence[int], name: str) -> Atom:
    """An atom with equal blocks of a dimension in another order.

    Raises:
        CheckpointError: when the dimension is not made of so many blocks.
    """
    if len(atom.shape) <= dim or atom.shape[dim] % len(order):
        raise CheckpointError(
            f"{name} is of {list(atom.shape)}",
            why=f"its dimension {dim} is not made of {len(order)} equal blocks",
        )
    width = atom.shape[dim] // len(order)
    old = np.array(order, np.int64)
    # Blocks that stay neighbours move together, so that no table gets longer than it must.
    first = np.flatnonzero(np.concatenate([[True], np.diff(old) != 1]))
    count: Table = np.diff(np.concatenate([first, [len(old)]]))
    return moves.reordered(atom, dim, old[first] * width, first * width, count * width)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda index: order[index]))
