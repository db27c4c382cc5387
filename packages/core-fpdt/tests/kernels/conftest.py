from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from core.softmax import Partial
from core_fpdt.kernels.contract import Gradients, Kernel, Scores
from core_fpdt.kernels.merging import accumulate
from core_fpdt.masks.tiles import Kind, Tile


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values of a whole row of blocks, and who sees whom.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        grad: (B, H, Tq, Dv) gradient of the output.
        visible: (B or 1, H or 1, Tq, Tk).
        scores: how scores are made.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    visible: Tensor
    scores: Scores

    def to(self, dtype: torch.dtype) -> Attention:
        query, key, value, grad = (
            x.to(dtype) for x in (self.query, self.key, self.value, self.grad)
        )
        return replace(self, query=query, key=key, value=value, grad=grad)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def truth(self) -> tuple[Partial, Gradients]:
        """Softmax over everything by autograd in float64; nothing of the package is used."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        query, key, value = inputs
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        logits = query @ key.mT * self.scores.scale
        if self.scores.softcap is not None:
            logits = (logits / self.scores.softcap).tanh() * self.scores.softcap
        logits = logits.masked_fill(~self.visible, -torch.inf)
        blind = ~self.visible.any(-1, keepdim=True)
        weights = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        output = weights @ value
        found = torch.autograd.grad(output, inputs, self.grad.double())
        return Partial(output.detach(), logits.detach().logsumexp(-1)), Gradients(*found)

    def blocks(self, edges: list[int]) -> Iterator[tuple[slice, Tile]]:
        """Tiles between neighbouring edges of keys; empty ones are left out."""
        for begin, end in pairwise(edges):
            part = self.visible[..., begin:end]
            if part.any():
                yield slice(begin, end), tile_of(part, begin)

    def run(self, kernel: Kernel, edges: list[int]) -> tuple[Partial, Gradients]:
        """Forwards and backwards over blocks of keys."""
        running: Partial | None = None
        for where, tile in self.blocks(edges):
            key, value = self.key[:, :, where], self.value[:, :, where]
            assert kernel.works(self.query, key, value, tile, self.scores) == ""
            running = accumulate(kernel, running, self.query, key, value, tile, self.scores)
        assert running is not None
        return running, self.back(kernel, edges, running)

    def back(self, kernel: Kernel, edges: list[int], merged: Partial) -> Gradients:
        """Backwards alone; sums are in float32 or float64."""
        sums = Gradients(*(torch.zeros_like(x, dtype=merged.lse.dtype) for x in self.inputs))
        output = merged.output.to(self.query.dtype)
        for where, tile in self.blocks(edges):
            key, value = self.key[:, :, where], self.value[:, :, where]
            found = kernel.backward(
                self.grad, self.query, key, value, output, merged.lse, tile, self.scores
            )
            assert [x.shape for x in found] == [x.shape for x in (self.query, key, value)]
            sums.query.add_(found.query)
            sums.key[:, :, where] += found.key
            sums.value[:, :, where] += found.value
        return sums


def tile_of(visible: Tensor, begin: int = 0) -> Tile:
    rows, columns = visible.shape[-2:]
    ranges = (0, rows), (begin, begin + columns)
    if visible.all():
        return Tile(Kind.FULL, *ranges)
    if rows == columns and torch.equal(visible, torch.ones_like(visible).tril()):
        return Tile(Kind.CAUSAL, *ranges)
    return Tile(Kind.PARTIAL, *ranges, evaluate=lambda: visible)


def random_attention(
    kind: str = "full",
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    tokens: tuple[int, int] = (19, 19),
    widths: tuple[int, int] = (16, 16),
    softcap: float | None = None,
    strided: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Attention:
    """Random tensors; ``kind`` is full, causal, holes (with blind rows) or one mask for all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, length: int, width: int) -> Tensor:
        shape = (batch, length, count, width) if strided else (batch, count, length, width)
        made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return made.transpose(1, 2) if strided else made

    visible = torch.ones(1, 1, *tokens, dtype=torch.bool)
    if kind == "causal":
        visible = visible.tril()
    elif kind == "holes":
        visible = torch.rand(batch, heads[0], *tokens, generator=generator) < 0.5
        visible[-1, :, 0] = False
    elif kind == "shared holes":
        visible = torch.rand(1, 1, *tokens, generator=generator) < 0.5
        visible = visible.expand(batch, 1, -1, -1)
    return Attention(
        draw(heads[0], tokens[0], widths[0]),
        draw(heads[1], tokens[1], widths[0]),
        draw(heads[1], tokens[1], widths[1]),
        draw(heads[0], tokens[0], widths[1]),
        visible,
        Scores(0.9 * widths[0] ** -0.5, softcap),
    )


@pytest.fixture
def attention() -> Callable[..., Attention]:
    """Makes random attention."""
    return random_attention


@pytest.fixture
def error() -> Callable[..., float]:
    """Largest difference of tensors, relative to the largest number of each if that is above 1."""

    def of(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
        worst = 0.0
        for left, right in zip(found, truth, strict=True):
            assert torch.equal(left == -torch.inf, right == -torch.inf)
            one, other = (x.double().masked_fill(x == -torch.inf, 0) for x in (left, right))
            scale = float(other.abs().max().clamp_min(1)) if other.numel() else 1.0
            difference = float((one - other).abs().max()) if one.numel() else 0.0
            assert difference == difference, "not a number"
            worst = max(worst, difference / scale)
        return worst

    return of
