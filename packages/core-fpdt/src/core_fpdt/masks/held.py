"""Rules that look tokens up in tensors: padding, documents, blocks, positions.

Every tensor is looked through on the CPU, where it is brought once, so that no rectangle waits for
a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from core_fpdt.masks.rules import (
    MIXED,
    TENSORS,
    Causal,
    Chunked,
    Grid,
    Range,
    Rule,
    Sight,
    Surroundings,
    Window,
    by_rows,
)

_LARGEST = torch.iinfo(torch.int64).max


class Held(Rule):
    """A rule with a tensor."""

    @property
    def price(self) -> int:
        return TENSORS


@dataclass(frozen=True, eq=False)
class Padding(Held):
    """Nobody sees padding.

    Args:
        real: (B, L) booleans, L the end of the keys or more.
    """

    real: Tensor
    _known: dict[Range, Sight] = field(default_factory=dict, init=False, repr=False)

    def sight(self, queries: Range, keys: Range) -> Sight:
        if keys not in self._known:
            part = self.here[:, keys[0] : keys[1]]
            none, every = (~part.any(1)).tolist(), part.all(1).tolist()
            self._known[keys] = by_rows(zip(none, every, strict=True))
        return self._known[keys]

    def visible(self, at: Grid) -> Tensor:
        return self.real[at.batch, at.key]

    @cached_property
    def here(self) -> Tensor:
        """``real`` on the CPU."""
        return self.real.cpu()


@dataclass(frozen=True, eq=False)
class Alike(Held):
    """Those with the same number see each other: documents of a packed row, blocks of an image.

    Args:
        ids: (B, L) integers, L the end of the keys or more.
        blocks: negative numbers see nobody and are seen by nobody.
    """

    ids: Tensor
    blocks: bool = False
    _ends: dict[Range, list[tuple[int, int, bool]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def sight(self, queries: Range, keys: Range) -> Sight:
        return by_rows(map(_alike, self._range(queries), self._range(keys)))

    def visible(self, at: Grid) -> Tensor:
        query = self.ids[at.batch, at.query]
        same = query == self.ids[at.batch, at.key]
        return same & (query >= 0) if self.blocks else same

    def horizon(self, edge: int) -> int:
        index = min(edge, self._reach.shape[1]) - 1
        return 0 if index < 0 else int(self._reach[:, index].max())

    @cached_property
    def here(self) -> Tensor:
        """``ids`` on the CPU in 64 bits."""
        return self.ids.cpu().long()

    def _range(self, span: Range) -> list[tuple[int, int, bool]]:
        """Smallest and largest number in a range of every row, and whether some have none."""
        if span not in self._ends:
            part = self.here[:, span[0] : span[1]]
            without = part < 0 if self.blocks else torch.zeros_like(part, dtype=torch.bool)
            low = part.masked_fill(without, _LARGEST).amin(1).tolist()
            high = part.masked_fill(without, -_LARGEST).amax(1).tolist()
            self._ends[span] = list(zip(low, high, without.any(1).tolist(), strict=True))
        return self._ends[span]

    @cached_property
    def _reach(self) -> Tensor:
        """(B, L) index behind the last token that one up to this one sees."""
        rows: list[Tensor] = []
        for row in self.here:
            numbers, of = torch.unique(row, return_inverse=True)
            behind = torch.arange(1, len(row) + 1)
            last = torch.zeros(len(numbers), dtype=torch.long).scatter_reduce(0, of, behind, "amax")
            reach = last[of].masked_fill(row < 0, 0) if self.blocks else last[of]
            rows.append(reach.cummax(0).values)
        return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Remapped(Held):
    """Another rule, asked with positions instead of indices.

    Args:
        rule: the rule.
        positions: (B, L) integers, L the end of the queries and of the keys or more.
    """

    rule: Rule
    positions: Tensor

    @property
    def price(self) -> int:
        return max(TENSORS, self.rule.price)

    def sight(self, queries: Range, keys: Range) -> Sight:
        # What these rules say of a range holds for everything within it; others are no arithmetic.
        if not isinstance(self.rule, Causal | Window | Surroundings | Chunked):
            return MIXED
        return self.rule.sight(self._range(queries), self._range(keys))

    def visible(self, at: Grid) -> Tensor:
        query, key = self.positions[at.batch, at.query], self.positions[at.batch, at.key]
        return self.rule.visible(Grid(at.batch, query, key))

    @cached_property
    def here(self) -> Tensor:
        """``positions`` on the CPU."""
        return self.positions.cpu()

    def _range(self, span: Range) -> Range:
        part = self.here[:, span[0] : span[1]]
        return int(part.min()), int(part.max()) + 1


def _alike(query: tuple[int, int, bool], key: tuple[int, int, bool]) -> tuple[bool, bool]:
    low, high, some_without = query
    early, late, others_without = key
    hidden = max(low, early) > min(high, late)
    shown = low == high == early == late and not (some_without or others_without)
    return hidden, shown
