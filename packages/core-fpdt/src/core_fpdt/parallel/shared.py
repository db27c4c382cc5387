"""A sequence that several ranks share: tokens of every chunk, and heads of its attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core_fpdt.kernels.contract import Gradients
from core_fpdt.layer.step import Inputs
from core_fpdt.parallel.exchange import Headed, cut, to_heads, to_sequence
from core_fpdt.parallel.heads import HeadPlan, plan_heads
from core_fpdt.parallel.placement import Placement


class Shared:
    """One call of a layer on a sequence that several ranks share; see :class:`Sharing`.

    All ranks call each method together, with the same chunk. The first one is :meth:`to_heads`, which
    learns how many heads the layer has.

    Args:
        placement: who has which tokens.
        group: the ranks.
    """

    def __init__(self, placement: Placement, group: ProcessGroup) -> None:
        self.edges = placement.edges
        self.local_edges = placement.local_edges(group.rank())
        self._placement = placement
        self._group = group
        self._heads: HeadPlan | None = None

    def to_heads(self, index: int, inputs: Inputs) -> Inputs:
        """From this rank's tokens of a chunk, with all heads, to all tokens with its heads.

        Raises:
            ModelError: for fewer heads than ranks.
        """
        query, key, value, scores, sinks = inputs
        self._heads = plan_heads(query.shape[1], key.shape[1], self._group.size())
        parts = self._queries(query), self._keys(key), self._keys(value)
        query, key, value = to_heads(parts, self._placement.pieces(index), self._group)
        own = None if sinks is None else sinks[self._own]
        return Inputs(query, self._repeated(key), self._repeated(value), scores, own)

    def heads_of(self, index: int, tensor: Tensor, like: Inputs) -> Tensor:
        """The same for one tensor with the heads of the queries, such as the gradient of the output."""
        (found,) = to_heads([self._queries(tensor)], self._placement.pieces(index), self._group)
        return found

    def to_sequence(self, index: int, output: Tensor) -> Tensor:
        """From all tokens with this rank's heads of the queries to its tokens with all heads."""
        (found,) = to_sequence([self._queries(output)], self._placement.pieces(index), self._group)
        return found

    def gradients_to_sequence(self, index: int, gradients: Gradients) -> Gradients:
        """The same for gradients of queries, keys and values; those of shared key heads are added."""
        query, key, value = gradients
        parts = self._queries(query), self._keys(self._summed(key)), self._keys(self._summed(value))
        return Gradients(*to_sequence(parts, self._placement.pieces(index), self._group))

    def sinks_of_all(self, gradient: Tensor, heads: int) -> Tensor:
        """(heads,) from the gradient of this rank's sinks; 0 at heads of other ranks."""
        whole = gradient.new_zeros(heads)
        whole[self._own] = gradient
        return whole

    @property
    def _plan(self) -> HeadPlan:
        assert self._heads is not None, "nothing is attended to before there are queries"
        return self._heads

    @property
    def _own(self) -> slice:
        return cut(self._plan.queries(self._group.rank()))

    def _queries(self, tensor: Tensor) -> Headed:
        return Headed(tensor, [self._plan.queries(rank) for rank in range(self._group.size())])

    def _keys(self, tensor: Tensor) -> Headed:
        return Headed(tensor, [self._plan.keys(rank) for rank in range(self._group.size())])

    def _repeated(self, keys: Tensor) -> Tensor:
        """One head of keys for every head of queries, where kernels need that."""
        repeats = self._plan.repeats(self._group.rank())
        if repeats is None:
            return keys
        return keys.repeat_interleave(torch.tensor(repeats, device=keys.device), dim=1)

    def _summed(self, gradients: Tensor) -> Tensor:
        """Gradients of heads that were repeated, added up."""
        repeats = self._plan.repeats(self._group.rank())
        if repeats is None:
            return gradients
        parts = torch.split(gradients, list(repeats), dim=1)
        return torch.cat([part.sum(1, keepdim=True) for part in parts], dim=1)
