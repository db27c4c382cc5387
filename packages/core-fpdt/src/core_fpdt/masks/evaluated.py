"""Rules of which nothing is known but their value at every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_fpdt.masks.rules import EVALUATION, MIXED, Grid, Range, Rule, Sight, grid

MaskFunction = Callable[..., Any]
"""``(batch, head, query, key)`` indices to whether the query sees the key, as transformers has it."""

STRIPE = 2**24
"""Pairs that are evaluated at once in the search for the horizon."""


class Extent(NamedTuple):
    """What a mask is asked about: its rows, and the indices of its queries and keys."""

    batch: int
    queries: Range
    keys: Range
    device: torch.device


@dataclass(frozen=True, eq=False)
class Evaluated(Rule):
    """A rule that has to be evaluated to know anything of it.

    Args:
        extent: where it can be evaluated.
    """

    extent: Extent

    @property
    def price(self) -> int:
        return EVALUATION

    def sight(self, queries: Range, keys: Range) -> Sight:
        return MIXED

    def horizon(self, edge: int) -> int:
        index = min(edge, self.extent.queries[1]) - 1 - self.extent.queries[0]
        return 0 if index < 0 else int(self._reach[index])

    @cached_property
    def _reach(self) -> Tensor:
        """(Tq,) index behind the last key that a query up to this one sees; evaluates every pair once."""
        (first, end), keys = self.extent.queries, self.extent.keys
        width = keys[1] - keys[0]
        step = max(1, STRIPE // max(1, self.extent.batch * width))
        stripes: list[Tensor] = []
        for start in range(first, end, step):
            span = start, min(start + step, end)
            seen = self.visible(grid(self.extent.batch, span, keys, self.extent.device))
            seen = seen.expand(*seen.shape[:2], span[1] - span[0], width).amax((0, 1))
            # The first of the largest, counted from the end, is the last key that is seen.
            last = keys[1] - seen.flip(-1).to(torch.uint8).argmax(-1)
            stripes.append(last.masked_fill(~seen.any(-1), 0))
        return torch.cat(stripes).cummax(0).values.cpu()


@dataclass(frozen=True, eq=False)
class Unknown(Evaluated):
    """A mask function of somebody's own.

    It must answer for a pair whatever other pairs it is asked about, as transformers demands it.

    Args:
        function: (batch, head, query, key) indices to booleans.
        use_vmap: call it for single pairs, vectorized; else with indices that broadcast.
    """

    function: MaskFunction
    use_vmap: bool = False

    def visible(self, at: Grid) -> Tensor:
        if self.use_vmap:
            return self._mapped(at)
        heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=at.key.device)
        seen: Tensor = self.function(at.batch, heads, at.query, at.key)
        return seen.to(torch.bool).expand(-1, -1, at.query.shape[2], at.key.shape[3])

    def _mapped(self, at: Grid) -> Tensor:
        # Lets functions look up tensors at indices that are vectorized away, as transformers does.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        rows = at.batch.shape[0]
        query = at.query.expand(rows, 1, -1, 1)[:, 0, :, 0]
        key = at.key.expand(rows, 1, 1, -1)[:, 0, 0, :]
        function = torch.vmap(self.function, in_dims=(None, None, None, 0))
        function = torch.vmap(function, in_dims=(None, None, 0, None))
        function = torch.vmap(function, in_dims=(None, 0, None, None))
        function = torch.vmap(function, in_dims=(0, None, 0, 0))
        heads = torch.zeros(1, dtype=torch.long, device=key.device)
        with TransformGetItemToIndex():
            seen: Tensor = function(at.batch[:, 0, 0, 0], heads, query, key)
        return seen.to(torch.bool)


@dataclass(frozen=True, eq=False)
class Given(Evaluated):
    """A mask that is there already.

    Args:
        mask: (B, H or 1, Tq, Tk) booleans, of the extent.
    """

    mask: Tensor

    def visible(self, at: Grid) -> Tensor:
        heads = torch.arange(self.mask.shape[1], device=self.mask.device).view(1, -1, 1, 1)
        return self.mask[at.batch, heads, at.query, at.key]
