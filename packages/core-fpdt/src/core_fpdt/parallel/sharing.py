"""Which tokens of every chunk this rank has, and how ranks exchange tokens for heads and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from core_fpdt.kernels.contract import Gradients
from core_fpdt.layer.step import Inputs


class Sharing(Protocol):
    """How one sequence is shared by ranks: all exchanges of a layer go through this."""

    @property
    def edges(self) -> Sequence[int]:
        """``[0, c, 2c, ..., S]`` of the whole sequence."""
        ...

    @property
    def local_edges(self) -> Sequence[int]:
        """The same chunks in the tokens of this rank."""
        ...

    def to_heads(self, index: int, inputs: Inputs) -> Inputs:
        """From this rank's tokens of a chunk, with all heads, to all tokens with its heads."""
        ...

    def heads_of(self, index: int, tensor: Tensor, like: Inputs) -> Tensor:
        """The same for one tensor with the heads of the queries, such as the gradient of the output."""
        ...

    def to_sequence(self, index: int, output: Tensor) -> Tensor:
        """From all tokens with this rank's heads of the queries to its tokens with all heads."""
        ...

    def gradients_to_sequence(self, index: int, gradients: Gradients) -> Gradients:
        """The same for gradients of queries, keys and values; those of shared key heads are added."""
        ...

    def sinks_of_all(self, gradient: Tensor, heads: int) -> Tensor:
        """(heads,) from the gradient of this rank's sinks; 0 at heads of other ranks."""
        ...


class Alone:
    """A sequence that one rank has for itself.

    Args:
        edges: its chunks.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = edges
        self.local_edges = edges

    def to_heads(self, index: int, inputs: Inputs) -> Inputs:
        """Nothing to exchange."""
        return inputs

    def heads_of(self, index: int, tensor: Tensor, like: Inputs) -> Tensor:
        """Nothing to exchange."""
        return tensor

    def to_sequence(self, index: int, output: Tensor) -> Tensor:
        """Nothing to exchange."""
        return output

    def gradients_to_sequence(self, index: int, gradients: Gradients) -> Gradients:
        """Nothing to exchange."""
        return gradients

    def sinks_of_all(self, gradient: Tensor, heads: int) -> Tensor:
        """Nothing to fill up."""
        return gradient
