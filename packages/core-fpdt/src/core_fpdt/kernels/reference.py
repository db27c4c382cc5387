"""Blocks by explicit scores: any device, dtype, mask, softcap and widths, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from torch import Tensor

from core.softmax import Partial, attend
from core_fpdt.kernels.casting import accumulator
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.masks.tiles import Kind, Tile

CPU_BYTES: Final = 32 * 2**20
DEVICE_BYTES: Final = 256 * 2**20
"""Bytes of scores that exist at once."""


@dataclass(frozen=True)
class Reference:
    """Computes in float32, or float64 for float64 inputs.

    Args:
        name: what ``fpdt.kernel`` calls it.
        score_bytes: bytes of scores that exist at once; 0 takes 32 MiB on CPUs and 256 MiB on other
            devices. One row of one key head is taken whatever it needs.
    """

    name: str = "reference"
    score_bytes: int = 0

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Nothing: it runs everywhere."""
        del device, dtype
        return ""

    def works(self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores) -> str:
        """Nothing: it computes everything."""
        del query, key, value, tile, scores
        return ""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
    ) -> Partial:
        """See :meth:`core_fpdt.kernels.contract.Kernel.forward`."""
        wide = accumulator(query.dtype)
        output = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=wide)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=wide)
        for part in self._parts(query, key):
            q, k = query[part.queries].to(wide), key[part.keys].to(wide)
            # Scores are made here, for softcaps; the softmax takes them as the mask of a zero product.
            made = attend(
                q.new_zeros((*q.shape[:3], 1)),
                k.new_zeros((*k.shape[:3], 1)),
                value[part.keys],
                mask=_logits(_products(q, k, scores), part, tile, scores)[0],
            )
            output[part.queries], lse[part.queries] = made
        return Partial(output, lse)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        tile: Tile,
        scores: Scores,
    ) -> Gradients:
        """See :meth:`core_fpdt.kernels.contract.Kernel.backward`; in float32 or float64."""
        wide = accumulator(query.dtype)
        made = Gradients(*(torch.zeros_like(x, dtype=wide) for x in (query, key, value)))
        # exp(score - inf) is 0: a row without any key has no gradient.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        for part in self._parts(query, key):
            q, g, o = (x[part.queries].to(wide) for x in (query, grad, output))
            k, v = (x[part.keys].to(wide) for x in (key, value))
            logits, slope = _logits(_products(q, k, scores), part, tile, scores)
            weights = (logits - lse[part.queries].unsqueeze(-1)).exp_()
            made.value[part.keys] += _over_group(weights, g, k)
            inner = _by_group(g, v) @ v.transpose(-1, -2)
            inner = inner.view_as(weights) - (g * o).sum(-1, keepdim=True)
            steps = weights.mul_(inner).mul_(scores.scale)
            if slope is not None:
                steps = steps.mul_(slope)
            made.query[part.queries] = (_by_group(steps, k) @ k).view_as(q)
            made.key[part.keys] += _over_group(steps, q, k)
        return made

    def _parts(self, query: Tensor, key: Tensor) -> Iterator[_Part]:
        """Pieces of a block whose scores fit: many heads together where rows are short."""
        batch, heads, rows = query.shape[:3]
        key_heads, keys = key.shape[1:3]
        group = heads // key_heads
        left = self.score_bytes or (CPU_BYTES if query.device.type == "cpu" else DEVICE_BYTES)
        left //= max(group * keys * accumulator(query.dtype).itemsize, 1)
        sizes: list[int] = []
        for most in (rows, key_heads, batch):
            sizes.append(max(1, min(most, left)))
            left //= sizes[-1]
        for b, h, t in product(
            _cut(batch, sizes[2]), _cut(key_heads, sizes[1]), _cut(rows, sizes[0])
        ):
            yield _Part((b, slice(h.start * group, h.stop * group), t), (b, h))


@dataclass(frozen=True)
class _Part:
    """Where a piece of a block is: in queries (B, H, Tq, ...), and in keys (B, Hkv, Tk, ...)."""

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice]

    def of_mask(self, mask: Tensor) -> Tensor:
        """The piece of a mask, whose batch and heads may be 1."""
        everything = slice(None)
        batch, heads, rows = self.queries
        return mask[
            batch if mask.shape[0] > 1 else everything,
            heads if mask.shape[1] > 1 else everything,
            rows,
        ]


def _cut(length: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _products(query: Tensor, key: Tensor, scores: Scores) -> Tensor:
    """(B, H, Tq, Tk) scaled products."""
    made = _by_group(query, key) @ key.transpose(-1, -2)
    return made.view(*query.shape[:3], key.shape[2]).mul_(scores.scale)


def _logits(
    products: Tensor, part: _Part, tile: Tile, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Logits with ``-inf`` where nothing is seen, and their slope by products if that is not 1."""
    slope: Tensor | None = None
    if scores.softcap is not None:
        capped = (products / scores.softcap).tanh()
        products, slope = capped * scores.softcap, 1 - capped.square()
    if tile.kind is Kind.PARTIAL:
        products = products.masked_fill(~part.of_mask(tile.visible()), -torch.inf)
    if tile.kind is Kind.CAUSAL:
        row = torch.arange(part.queries[2].start, part.queries[2].stop, device=products.device)
        column = torch.arange(products.shape[-1], device=products.device)
        products = products.masked_fill(column > row[:, None], -torch.inf)
    return products, slope


def _by_group(rows: Tensor, key: Tensor) -> Tensor:
    """(B, H, Tq, N) as (B, Hkv, H / Hkv * Tq, N): the rows that one key head is multiplied with."""
    return rows.reshape(rows.shape[0], key.shape[1], -1, rows.shape[3])


def _over_group(weights: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """(B, Hkv, Tk, N) sums of rows by their weights over all rows of a key head."""
    return _by_group(weights, key).transpose(-1, -2) @ _by_group(rows, key)


REFERENCE: Final = Reference()
