"""How logits come from hidden states: the weights of the head, and what the model does to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COPIES = 4
"""Tensors of the size of the logits that a loss and its backward pass hold at the same time."""


class Step(NamedTuple):
    """One elementwise operation on logits."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Projection:
    """From (N, H) hidden states to (N, V) logits, as the model computes them.

    Args:
        weight: (V, H).
        bias: (V,) or none.
        compute: dtype of the product, which autocast may have chosen.
        limit: bytes of logits and what a loss makes of them that may exist at once.
        steps: what follows the product, such as a scale or a softcap.
    """

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    limit: int
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, module: nn.Linear, limit: int) -> Projection:
        """Take the weights of a module, and the autocast that is in force now."""
        weight, dtype = module.weight, module.weight.dtype
        if torch.is_autocast_enabled(weight.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(weight.device.type)
        return cls(weight, module.bias, dtype, limit)

    @property
    def vocabulary(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]

    @property
    def rows(self) -> int:
        """How many tokens make up a chunk: a multiple of 64 where the limit leaves room for it."""
        rows = max(1, self.limit // bytes_of_loss(1, self.vocabulary, self.compute))
        return rows // 64 * 64 if rows >= 64 else rows

    def then(self, *step: Any) -> Projection:
        """Add a :class:`Step`."""
        return replace(self, steps=(*self.steps, Step(*step)))

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> Projection:
        """Project with other tensors: those that are differentiated, or were cast already."""
        return replace(self, weight=weight, bias=bias)

    def cast(self) -> Projection:
        """Cast the weights once, for many calls."""
        bias = None if self.bias is None else self.bias.to(self.compute)
        return self.with_weights(self.weight.to(self.compute), bias)

    def product(self, hidden: Tensor) -> Tensor:
        """(..., V) of (..., H), before the steps."""
        cast = self.cast()
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.compute), cast.weight, cast.bias)

    def finish(self, product: Tensor) -> Tensor:
        """Run the steps."""
        with torch.autocast(product.device.type, enabled=False):
            for step in self.steps:
                product = step.function(product, *step.args, **step.kwargs)
        return product


def bytes_of_loss(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes that a loss over logits of ``dtype`` and its backward pass need at once."""
    return tokens * vocabulary * torch.promote_types(dtype, torch.float32).itemsize * COPIES
