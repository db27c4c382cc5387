"""The gradients of a layer call, collected chunk by chunk."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from core_fpdt.layer.call import LayerCall
from core_fpdt.layer.graphs import unhooked
from core_fpdt.layer.slicing import Sums


class Collected:
    """Gradients of the hidden states, of arguments and of parameters.

    Args:
        call: the call that is gone backwards.
        like: a tensor of the device and dtype of the hidden states.
        shape: of the hidden states; ``None`` if these want no gradient.
        parameters: the parameters that want one.
    """

    def __init__(
        self, call: LayerCall, like: Tensor, shape: torch.Size | None, parameters: list[Tensor]
    ) -> None:
        self._call = call
        self._parameters = parameters
        self._arguments = call.arguments.differentiable
        self._sums = Sums([*self._arguments, *parameters])
        self._hidden = None if shape is None else like.new_zeros(shape)

    def leaf(self, piece: Tensor) -> Tensor:
        """A chunk of hidden states that a graph may begin at."""
        return piece.detach().requires_grad_(self._hidden is not None)

    def add(
        self,
        index: int,
        outputs: list[Tensor],
        grads: list[Tensor],
        piece: Tensor,
        wanted: list[Tensor],
    ) -> None:
        """Go backwards through the graph of one chunk.

        Args:
            index: number of the chunk.
            outputs: ends of the graph.
            grads: their gradients.
            piece: the chunk of hidden states that the graph begins at.
            wanted: the chunks of differentiable arguments that it begins at.
        """
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return
        begin, end = self._call.bounds(index)
        inputs = [*wanted, *self._parameters]
        if self._hidden is not None:
            inputs.insert(0, piece)
        ends, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
        with unhooked(self._parameters):
            found: list[Tensor | None] = list(
                torch.autograd.grad(ends, inputs, grads, allow_unused=True)
            )
        if self._hidden is not None:
            first, *found = found
            if first is not None:
                self._hidden[:, begin:end] += first
        for number, gradient in enumerate(found):
            of_argument = number < len(self._arguments)
            cut = (begin, end) if of_argument else None
            self._sums.add(number, gradient, partial(self._place, cut))

    def _place(self, cut: tuple[int, int] | None, total: Tensor) -> Tensor:
        """Where the gradient of a chunk belongs in that of the whole."""
        return total if cut is None else self._call.arguments.slice(total, *cut)

    def take(self) -> list[Tensor | None]:
        """Gradients of the hidden states, of the arguments and of the parameters."""
        return [self._hidden, *self._sums.take()]
