"""What a layer is called with, cut along the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Arguments:
    """Arguments of a layer beside its hidden states: chunks of those that run along the sequence.

    A tensor runs along the sequence if that is the size of its second dimension (B, S, ...), or of
    its only one: rotary tables, position ids, inputs per layer. All others go to every chunk whole.

    Args:
        args: positional arguments behind the hidden states.
        kwargs: keyword arguments.
        length: tokens of this rank.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], length: int) -> None:
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self.leaves: list[Any] = leaves
        self._length = length

    @property
    def differentiable(self) -> list[Tensor]:
        """Tensors among them that want a gradient, in a fixed order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def find(self, kind: type[Any]) -> Any:
        """The first argument of a class, or ``None``."""
        return next((leaf for leaf in self.leaves if isinstance(leaf, kind)), None)

    def chunk(
        self, begin: int, end: int, *, leaf: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """Arguments for tokens ``[begin, end)``.

        Args:
            begin: first token.
            end: one past the last.
            leaf: make the differentiable ones leaves of a new graph.

        Returns:
            Positional and keyword arguments, and the differentiable ones among them.
        """
        wanted: list[Tensor] = []

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            piece = self.slice(value, begin, end)
            if leaf and value.requires_grad:
                piece = piece.detach().requires_grad_()
                wanted.append(piece)
            return piece

        args, kwargs = pytree.tree_unflatten([cut(value) for value in self.leaves], self._spec)
        return cast("tuple[Any, ...]", args), cast("dict[str, Any]", kwargs), wanted

    def slice(self, value: Tensor, begin: int, end: int) -> Tensor:
        """The part of an argument that belongs to tokens ``[begin, end)``; maybe all of it."""
        if value.dim() > 1 and value.shape[1] == self._length:
            return value[:, begin:end]
        if value.dim() == 1 and value.shape[0] == self._length:
            return value[begin:end]
        return value


class Sums:
    """Gradients that come in pieces: added up in float32 (float64 for float64), given once.

    Args:
        tensors: what the gradients are of.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._totals: list[Tensor | None] = [None] * len(tensors)

    def add(self, index: int, gradient: Tensor | None, place: Callable[[Tensor], Tensor]) -> None:
        """Add a gradient of the part of a tensor that ``place`` cuts from it."""
        if gradient is None:
            return
        if (total := self._totals[index]) is None:
            precise = torch.promote_types(gradient.dtype, torch.float32)
            total = torch.zeros_like(self._tensors[index], dtype=precise, requires_grad=False)
            self._totals[index] = total
        place(total).add_(gradient)

    def take(self) -> list[Tensor | None]:
        """The gradients in the dtypes of their tensors; ``None`` where there was none."""
        pairs = zip(self._tensors, self._totals, strict=True)
        result = [None if total is None else total.to(tensor.dtype) for tensor, total in pairs]
        self._totals = []
        return result
