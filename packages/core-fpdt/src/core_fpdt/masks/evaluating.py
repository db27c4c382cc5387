"""Evaluating rules at the pairs of a tile, at most once while there is room to keep them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from core_fpdt.masks.rules import Range, Rule, grid

ROOM = 64 * 2**20
"""Bytes of evaluated tiles that one mask keeps for the layers to come."""


class Evaluator:
    """Evaluates tiles of one mask, and keeps those used last.

    Args:
        batch: rows of the mask.
        device: where it is evaluated.
        room: bytes to keep; a tile that is larger is evaluated every time.
    """

    def __init__(self, batch: int, device: torch.device, room: int = ROOM) -> None:
        self._batch = batch
        self._device = device
        self._room = room
        self._kept: OrderedDict[tuple[Range, Range], Tensor] = OrderedDict()

    def __call__(self, rule: Rule, queries: Range, keys: Range) -> Tensor:
        """(B or 1, H or 1, Tq, Tk) booleans, contiguous; ``rule`` is always the same for a tile."""
        place = queries, keys
        found = self._kept.get(place)
        if found is None:
            found = self._evaluate(rule, queries, keys)
            self._keep(place, found)
        else:
            self._kept.move_to_end(place)
        return found

    def used(self) -> int:
        """Bytes kept."""
        return sum(tile.nbytes for tile in self._kept.values())

    def _evaluate(self, rule: Rule, queries: Range, keys: Range) -> Tensor:
        seen = rule.visible(grid(self._batch, queries, keys, self._device))
        shape = queries[1] - queries[0], keys[1] - keys[0]
        return seen.expand(*seen.shape[:2], *shape).contiguous()

    def _keep(self, place: tuple[Range, Range], tile: Tensor) -> None:
        if tile.nbytes > self._room:
            return
        self._kept[place] = tile
        while self.used() > self._room:
            self._kept.popitem(last=False)
