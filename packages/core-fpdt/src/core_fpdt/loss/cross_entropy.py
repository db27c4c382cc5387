"""Cross entropy of hidden states, chunk by chunk, with the gradients computed on the way.

As the loss of a chunk and its gradient need the same logits, both are computed while they are there
(FPDT, arXiv 2408.16978, section 4 recomputes them instead), and multiplied in the backward pass by
whatever gradient arrives. The weight gradient is accumulated in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core_fpdt.layer.graphs import refuse_graph
from core_fpdt.loss.projection import Projection

Reduction = Literal["mean", "sum", "none"]

_ROWS = 4096
"""Of a gradient in 16 bits that are scaled at once."""


@dataclass(frozen=True)
class Rules:
    """The arguments of ``torch.nn.functional.cross_entropy`` of the same names."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: Reduction = "mean"
    label_smoothing: float = 0.0

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,) losses of (N, V) logits, in float32 at least."""
        precise = torch.promote_types(logits.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(precise)
        return nn.functional.cross_entropy(
            logits.to(precise),
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def total(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """What a mean divides by: the number of labels, or the sum of their weights."""
        valid = target != self.ignore_index
        if self.weight is None:
            return valid.sum().to(dtype)
        return (self.weight.to(dtype)[target.masked_fill(~valid, 0)] * valid).sum()


def chunked_cross_entropy(
    hidden: Tensor, projection: Projection, target: Tensor, rules: Rules
) -> Tensor:
    """Cross entropy of the logits of hidden states, of which only some exist at a time.

    Args:
        hidden: (N, H).
        projection: how logits come from them.
        target: (N,) class of every row, int64.
        rules: as in ``torch.nn.functional.cross_entropy``.

    Returns:
        A scalar, or (N,) without reduction, in the dtype that PyTorch gives it. Gradients reach
        ``hidden`` and the weights of the projection, those that need one, each exactly once.

    Raises:
        IndexError: for labels that are no classes, as PyTorch does.
        ModelError: in a second backward pass.
    """
    job = _Job(projection, rules, torch.is_grad_enabled())
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        job, hidden, projection.weight, projection.bias, target
    )
    return loss.to(_dtype_of_loss(projection, hidden.device))


@dataclass(frozen=True)
class _Job:
    projection: Projection
    rules: Rules
    differentiate: bool


class _Walk:
    """One pass over the chunks; gradients are those that are wanted.

    Args:
        job: what to compute; its weights are not used.
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or none.
        target: (N,).
        wanted: whether hidden, weight and bias get gradients.
        factors: (N,) of the loss of every row; one if not given.
    """

    def __init__(
        self,
        job: _Job,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        wanted: tuple[bool, bool, bool],
        factors: Tensor | None = None,
    ) -> None:
        self.job = job
        self.projection = job.projection.with_weights(weight, bias).cast()
        self.states = hidden
        self.target = target
        self.factors = factors
        self.precise = torch.promote_types(self.projection.compute, torch.float32)
        self.losses = hidden.new_empty(len(hidden), dtype=self.precise)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=self._sum(weight)) if wanted[1] else None
        self.bias = None
        if wanted[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=self._sum(bias))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in pieces(len(hidden), self.projection.rows):
                self._chunk(rows, any(wanted))

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden (in its dtype), weight and bias (in float32 at least)."""
        return self.hidden, self.weight, self.bias

    def _sum(self, parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, self.precise)

    def _chunk(self, rows: slice, differentiate: bool) -> None:
        hidden, target = self.states[rows], self.target[rows]
        product = self.projection.product(hidden)
        with torch.set_grad_enabled(differentiate):
            product.requires_grad_(differentiate)
            losses = self.job.rules.losses(self.projection.finish(product), target)
        self.losses[rows] = losses.detach()
        if not differentiate:
            return
        factors = torch.ones_like(losses) if self.factors is None else self.factors[rows]
        (grad,) = torch.autograd.grad(losses, product, factors.to(losses.dtype))
        if self.hidden is not None:
            self.hidden[rows] = grad @ self.projection.weight
        if self.weight is not None:
            _add_product(self.weight, grad.t(), hidden.to(grad.dtype))
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        ctx.job = job
        if job.rules.reduction == "none":
            # The factors of the gradients are only known in the backward pass.
            ctx.save_for_backward(hidden, weight, bias, target)
            return _Walk(job, hidden, weight, bias, target, (False, False, False)).losses
        wanted = tuple(ctx.needs_input_grad[1:4]) if job.differentiate else (False, False, False)
        walk = _Walk(job, hidden, weight, bias, target, wanted)
        total = walk.losses.new_ones(())
        if job.rules.reduction == "mean":
            total = job.rules.total(target, walk.losses.dtype)
        # Without a single label PyTorch's loss is NaN, and its gradient zero.
        valid = (target != job.rules.ignore_index).any()
        ctx.found, ctx.factor = walk.found(), torch.where(valid, 1 / total, 0)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        return walk.losses.sum() / total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_graph("a chunked loss")
        if ctx.job.rules.reduction == "none":
            hidden, weight, bias, target = ctx.saved_tensors
            wanted = tuple(ctx.needs_input_grad[1:4])
            found = _Walk(ctx.job, hidden, weight, bias, target, wanted, grad).found()
            pairs = zip(found, (hidden, weight, bias), strict=True)
            return None, *(None if f is None else f.to(t.dtype) for f, t in pairs), None
        found, ctx.found = ctx.found, None
        if found is None:
            raise ModelError(
                "a second backward pass through the same chunked loss",
                why="its gradients were computed in place, and given away by the first one",
                fix="add the losses up first, and call backward() once",
            )
        factor = grad.to(ctx.factor.dtype) * ctx.factor
        pairs = zip(found, ctx.dtypes, strict=True)
        return None, *(None if f is None else _scale(f, factor).to(t) for f, t in pairs), None


def _dtype_of_loss(projection: Projection, device: torch.device) -> torch.dtype:
    """Ask PyTorch, which under autocast answers otherwise."""
    example = torch.zeros(1, projection.vocabulary, dtype=projection.compute, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    return nn.functional.cross_entropy(projection.finish(example), target).dtype


def pieces(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of at most ``size``."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _scale(total: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place, in the precision of the factor, which is not rounded to ``total``'s."""
    if total.dtype == factor.dtype:
        return total.mul_(factor)
    for rows in pieces(len(total), _ROWS):
        total[rows] = total[rows].to(factor.dtype) * factor
    return total
