"""A pass as attention sees it: tokens of several sequences behind each other in one row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.positions.policy import Positions
from core.positions.tokens import RequestState

Made = TypeVar("Made")


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence.

    Args:
        row: index of the first one in the packed row.
        begin: tokens of the sequence that are in the store already.
        end: tokens that are in the store when the pass is done.
        table: blocks of the store that hold them, in order.
        prompt: length of the sequence's prompt.
        known: tokens of the sequence that are known, computed or not.
        state: what policies of positions keep about the request.
        policy: the policy of this request, where it brings one.
        begun: layers in which the policy has looked at the prompt.
    """

    row: int
    begin: int
    end: int
    table: Sequence[int]
    prompt: int
    known: int
    state: RequestState = field(default_factory=RequestState)
    policy: Positions | None = None
    begun: set[int] = field(default_factory=set[int])
    _stretches: dict[int, list[slice]] = field(default_factory=dict[int, list[slice]], repr=False)

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def rows(self) -> slice:
        """Where they are in the packed row."""
        return slice(self.row, self.row + len(self))

    def stretches(self, block_size: int) -> list[slice]:
        """Slots of the store that hold all tokens up to ``end``, as few slices as there are."""
        # Every layer asks.
        if block_size not in self._stretches:
            self._stretches[block_size] = self._find_stretches(block_size)
        return self._stretches[block_size]

    def _find_stretches(self, block_size: int) -> list[slice]:
        found: list[slice] = []
        left = self.end
        for block in self.table:
            if left <= 0:
                break
            begin = block * block_size
            stop = begin + min(block_size, left)
            left -= block_size
            if found and found[-1].stop == begin:
                begin = found.pop().start
            found.append(slice(begin, stop))
        return found


@dataclass(frozen=True)
class Ragged:
    """All spans of one pass.

    Args:
        spans: in the order of the packed row.
        block_size: tokens in a block of the store.
        device: where the model is.
    """

    spans: Sequence[Span]
    block_size: int
    device: torch.device
    _made: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What the layers of a pass share: made for the first one that asks."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    @cached_property
    def positions(self) -> Tensor:
        """(1, T) position of every token in its sequence."""
        return self._row([torch.arange(s.begin, s.end) for s in self.spans])

    @cached_property
    def owner(self) -> Tensor:
        """(1, T) index of the span of every token."""
        return self._row([torch.full((len(s),), i) for i, s in enumerate(self.spans)])

    @cached_property
    def slots(self) -> Tensor:
        """(T,) where the store keeps every token."""
        size, found = self.block_size, []
        for span in self.spans:
            if len(span) == 1:
                found.append(span.table[span.begin // size] * size + span.begin % size)
                continue
            found.extend(
                span.table[token // size] * size + token % size
                for token in range(span.begin, span.end)
            )
        return torch.tensor(found, device=self.device)

    def _row(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).unsqueeze(0).to(self.device)
