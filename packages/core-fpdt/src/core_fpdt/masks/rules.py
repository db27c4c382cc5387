"""Rules of who sees whom that need nothing but the indices of tokens.

A rule answers twice: for a whole rectangle of queries and keys in a few operations on numbers, so
that most of a long sequence is decided without a mask, and for every pair in tensors, where a
rectangle is undecided.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]
"""Half-open range of token indices."""

FOREVER = sys.maxsize
"""Beyond the last key, wherever that is."""

INDICES, TENSORS, EVALUATION = range(3)
"""What an answer for a rectangle costs: arithmetic, a look into a tensor, or all of its pairs."""


class Sight(NamedTuple):
    """What is known of a rectangle; one bit for each row of the batch, all bits of rules without rows.

    Args:
        hidden: rows in which no query sees a key.
        shown: rows in which every query sees every key.
    """

    hidden: int
    shown: int


MIXED = Sight(0, 0)
NOBODY = Sight(-1, 0)
EVERYBODY = Sight(0, -1)


def decide(hidden: bool, shown: bool) -> Sight:
    """Make what a rule without rows knows of a rectangle."""
    return NOBODY if hidden else EVERYBODY if shown else MIXED


def by_rows(rows: Iterable[tuple[bool, bool]]) -> Sight:
    """Make a sight of (hidden, shown) for each row of the batch."""
    hidden = shown = count = 0
    for no, yes in rows:
        hidden |= no << count
        shown |= yes << count
        count += 1
    every = (1 << count) - 1
    return NOBODY if hidden == every else EVERYBODY if shown == every else Sight(hidden, shown)


class Grid(NamedTuple):
    """Indices of every pair of a rectangle, to be broadcast: (B, 1, 1, 1), (1, 1, Tq, 1), (1, 1, 1, Tk)."""

    batch: Tensor
    query: Tensor
    key: Tensor


def grid(batch: int, queries: Range, keys: Range, device: torch.device) -> Grid:
    """Make the indices of a rectangle."""
    rows = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    query = torch.arange(*queries, device=device).view(1, 1, -1, 1)
    return Grid(rows, query, torch.arange(*keys, device=device).view(1, 1, 1, -1))


class Rule(ABC):
    """Who sees whom."""

    @property
    def price(self) -> int:
        """What an answer costs: ``INDICES``, ``TENSORS`` or ``EVALUATION``."""
        return INDICES

    @abstractmethod
    def sight(self, queries: Range, keys: Range) -> Sight:
        """What is surely so in a rectangle; never evaluates its pairs."""

    @abstractmethod
    def visible(self, at: Grid) -> Tensor:
        """Booleans that broadcast to (B, H, Tq, Tk)."""

    def narrow(self, queries: Range, keys: Range) -> Rule:
        """Leave out what does not matter in a rectangle, so that less is evaluated there."""
        return self

    def horizon(self, edge: int) -> int:
        """Index behind the last key that a query before ``edge`` may see, or something larger."""
        return FOREVER


@dataclass(frozen=True)
class Constant(Rule):
    """Everybody sees everybody, or nobody."""

    value: bool

    def sight(self, queries: Range, keys: Range) -> Sight:
        return EVERYBODY if self.value else NOBODY

    def visible(self, at: Grid) -> Tensor:
        return torch.full((1, 1, 1, 1), self.value, device=at.key.device)

    def horizon(self, edge: int) -> int:
        return FOREVER if self.value else 0


EVERYTHING = Constant(True)
NOTHING = Constant(False)


@dataclass(frozen=True)
class Causal(Rule):
    """Nobody sees what comes later."""

    def sight(self, queries: Range, keys: Range) -> Sight:
        return decide(keys[0] >= queries[1], keys[1] - 1 <= queries[0])

    def visible(self, at: Grid) -> Tensor:
        return at.key <= at.query

    def horizon(self, edge: int) -> int:
        return edge


@dataclass(frozen=True)
class Window(Rule):
    """Nobody sees what lies ``size`` tokens back or more; what comes later is another rule's matter."""

    size: int

    def sight(self, queries: Range, keys: Range) -> Sight:
        farthest, nearest = queries[1] - 1 - keys[0], queries[0] - keys[1] + 1
        return decide(nearest >= self.size, farthest < self.size)

    def visible(self, at: Grid) -> Tensor:
        return at.key > at.query - self.size


@dataclass(frozen=True)
class Surroundings(Rule):
    """Everybody sees those at most ``size`` tokens away, before and behind."""

    size: int

    def sight(self, queries: Range, keys: Range) -> Sight:
        back, ahead = queries[1] - 1 - keys[0], keys[1] - 1 - queries[0]
        apart = max(queries[0] - keys[1] + 1, keys[0] - queries[1] + 1)
        return decide(apart > self.size, max(back, ahead) <= self.size)

    def visible(self, at: Grid) -> Tensor:
        return (at.query - at.key).abs() <= self.size

    def horizon(self, edge: int) -> int:
        return edge + self.size


@dataclass(frozen=True, eq=False)
class Chunked(Rule):
    """Those of one stretch of ``size`` tokens see each other.

    Args:
        size: tokens of a stretch.
        starts: (B,) where the first stretch of each row begins.
        begins: ``starts`` as numbers.
    """

    size: int
    starts: Tensor
    begins: tuple[int, ...]

    def sight(self, queries: Range, keys: Range) -> Sight:
        return by_rows(self._row(start, queries, keys) for start in self.begins)

    def visible(self, at: Grid) -> Tensor:
        start = self.starts[at.batch]
        return (at.key - start) // self.size == (at.query - start) // self.size

    def horizon(self, edge: int) -> int:
        return max(((edge - 1 - b) // self.size + 1) * self.size + b for b in self.begins)

    def _row(self, start: int, queries: Range, keys: Range) -> tuple[bool, bool]:
        first, last = (queries[0] - start) // self.size, (queries[1] - 1 - start) // self.size
        early, late = (keys[0] - start) // self.size, (keys[1] - 1 - start) // self.size
        return late < first or early > last, first == last == early == late


@dataclass(frozen=True)
class Shifted(Rule):
    """Another rule, asked with other indices: ``query`` and ``key`` tokens further on."""

    rule: Rule
    query: int
    key: int

    @property
    def price(self) -> int:
        return self.rule.price

    def sight(self, queries: Range, keys: Range) -> Sight:
        return self.rule.sight(_moved(queries, self.query), _moved(keys, self.key))

    def visible(self, at: Grid) -> Tensor:
        return self.rule.visible(Grid(at.batch, at.query + self.query, at.key + self.key))

    def horizon(self, edge: int) -> int:
        if self.rule.price == EVALUATION:
            return FOREVER  # it would be evaluated where it is not asked
        return self.rule.horizon(edge + self.query) - self.key


def _moved(span: Range, distance: int) -> Range:
    return span[0] + distance, span[1] + distance
