"""A row of attention: the queries of one chunk against the keys of all chunks that they see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.softmax import Partial
from core_fpdt.kernels.choosing import Chooser
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.kernels.merging import accumulate
from core_fpdt.masks.lazy import LazyMask
from core_fpdt.masks.tiles import Kind, Tile
from core_fpdt.settings import JOINED_CHUNKS
from core_fpdt.store.contract import Lane


class Block(NamedTuple):
    """Chunks ``[first, last)`` of keys, and who sees them."""

    first: int
    last: int
    tile: Tile


@dataclass(frozen=True)
class Blocks:
    """Which blocks of attention there are to compute.

    Args:
        mask: who sees whom in the whole sequence.
        edges: ``[0, c, 2c, ..., S]`` of the whole sequence.
        kernels: what computes them.
        scores: how scores are made.
    """

    mask: LazyMask
    edges: Sequence[int]
    kernels: Chooser
    scores: Scores

    def tile(self, query: int, key: int) -> Tile:
        """The tile of a chunk of queries and a chunk of keys."""
        queries = self.edges[query], self.edges[query + 1]
        return self.mask.tile(queries, (self.edges[key], self.edges[key + 1]))

    def row(self, query: int, *, whole: bool) -> Iterator[Block]:
        """Blocks of a chunk of queries; empty ones are left out.

        Args:
            query: number of the chunk.
            whole: join neighbours in which everything is visible.
        """
        start = 0
        while start <= query:
            stop, tile = start + 1, self.tile(query, start)
            if whole and tile.kind is Kind.FULL:
                while (
                    stop <= min(query, start + JOINED_CHUNKS - 1)
                    and self.tile(query, stop).kind is Kind.FULL
                ):
                    stop += 1
                tile = Tile(Kind.FULL, tile.queries, (tile.keys[0], self.edges[stop]))
            if tile.kind is not Kind.EMPTY:
                yield Block(start, stop, tile)
            start = stop

    def column(self, key: int) -> Iterator[int]:
        """Chunks of queries that see anything of a chunk of keys."""
        for query in range(key, len(self.edges) - 1):
            if self.tile(query, key).kind is not Kind.EMPTY:
                yield query

    def attend(self, index: int, query: Tensor, keys: Lane, values: Lane) -> Partial:
        """Attend with a chunk of queries to everything it sees (paper, section 4.1).

        Args:
            index: number of the chunk.
            query: (B, H, c, D).
            keys: lane of (B, Hkv, c, D).
            values: lane of (B, Hkv, c, Dv).

        Returns:
            Merged output (B, H, c, Dv) in float32 (float64 for float64) and its lse.
        """
        running: Partial | None = None
        blocks = list(self.row(index, whole=keys.whole and values.whole))
        for number, block in enumerate(blocks):
            _prefetch(blocks[number + 1 : number + 2], keys, values)
            key, value = keys.get(block.first, block.last), values.get(block.first, block.last)
            kernel = self.kernels(query, key, value, block.tile, self.scores)
            running = accumulate(kernel, running, query, key, value, block.tile, self.scores)
            keys.done(block.first)
            values.done(block.first)
        if running is not None:
            precise = torch.promote_types(query.dtype, torch.float32)
            return Partial(running.output.to(precise), running.lse)
        return self._nothing(index, query, values)

    def gradients(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, saved: Saved
    ) -> Gradients:
        """What one block adds to the gradients of its queries, keys and values."""
        kernel = self.kernels(query, key, value, tile, self.scores)
        return kernel.backward(
            saved.grad, query, key, value, saved.output, saved.lse, tile, self.scores
        )

    def _nothing(self, index: int, query: Tensor, values: Lane) -> Partial:
        """The result of queries that see no key at all."""
        precise = torch.promote_types(query.dtype, torch.float32)
        width = values.get(index).shape[-1]
        values.done(index)
        output = query.new_zeros((*query.shape[:-1], width), dtype=precise)
        return Partial(output, output.new_full(query.shape[:-1], -torch.inf))


class Saved(NamedTuple):
    """What the backward pass of a row needs beside queries, keys and values.

    Args:
        grad: (B, H, c, Dv) gradient of the row's output.
        output: (B, H, c, Dv).
        lse: (B, H, c).
    """

    grad: Tensor
    output: Tensor
    lse: Tensor


def _prefetch(blocks: Sequence[Block], keys: Lane, values: Lane) -> None:
    for block in blocks:
        for index in range(block.first, block.last):
            keys.prefetch(index)
            values.prefetch(index)
