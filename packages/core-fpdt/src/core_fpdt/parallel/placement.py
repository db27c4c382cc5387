"""Who has which tokens: every chunk of a sequence is shared evenly by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Rank-ordinal placement of a sequence (paper, section 4.2), for any length.

    Rank ``r`` has the ``r``-th piece of every chunk. So what the ranks have of a chunk is, in the
    order of ranks, the chunk itself: an exchange of heads makes whole chunks, of which later ones see
    earlier ones and none sees a later one, and every rank does the same work in every chunk.

    Args:
        edges: ``(0, c, 2c, ..., S)``: chunk ``i`` has tokens ``edges[i]`` to ``edges[i + 1]``.
        ranks: number of ranks that share the sequence.

    Raises:
        ValueError: for edges that do not rise from 0, or no ranks.

    Example:
        >>> placement = Placement.regular(length=10, chunk=4, ranks=2)
        >>> [placement.indices(rank).tolist() for rank in range(2)]
        [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9]]
        >>> placement.local_edges(0)
        [0, 2, 4, 5]
    """

    edges: tuple[int, ...]
    ranks: int = 1

    def __post_init__(self) -> None:
        rising = all(begin < end for begin, end in pairwise(self.edges))
        if len(self.edges) < 2 or self.edges[0] != 0 or not rising:
            raise ValueError(f"edges of chunks rise from 0, unlike {list(self.edges)}")
        if self.ranks < 1:
            raise ValueError(f"{self.ranks} ranks cannot share a sequence")

    @classmethod
    def regular(cls, length: int, chunk: int, ranks: int = 1) -> Placement:
        """Place a sequence in chunks of ``chunk`` tokens; the last one has what is left.

        Args:
            length: tokens of the sequence, at least one.
            chunk: tokens in a chunk, over all ranks; at least one.
            ranks: number of ranks.
        """
        if length < 1 or chunk < 1:
            raise ValueError(f"{length} tokens cannot be cut into chunks of {chunk}")
        return cls((*range(0, length, chunk), length), ranks)

    @classmethod
    def of_edges(cls, edges: Sequence[int], ranks: int = 1) -> Placement:
        """Place a sequence whose chunks begin and end at ``edges``."""
        return cls(tuple(edges), ranks)

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.edges[-1]

    @property
    def chunks(self) -> int:
        """Number of chunks, the same on all ranks."""
        return len(self.edges) - 1

    def pieces(self, chunk: int) -> list[int]:
        """Tokens that each rank has of a chunk: they differ by one at most, and may be 0."""
        each, more = divmod(self.edges[chunk + 1] - self.edges[chunk], self.ranks)
        return [each + (rank < more) for rank in range(self.ranks)]

    def local_edges(self, rank: int) -> list[int]:
        """``[0, ..., s]``: where the chunks of a rank's own tokens begin and end."""
        return [0, *accumulate(self.pieces(chunk)[rank] for chunk in range(self.chunks))]

    def indices(self, rank: int) -> Tensor:
        """(s,) int64 places in the sequence of a rank's tokens, in the order it keeps them."""
        return torch.cat([torch.arange(*self._piece(i, rank)) for i in range(self.chunks)])

    @cached_property
    def inverse(self) -> Tensor:
        """(S,) int64 places of all tokens in what the ranks have, joined in the order of ranks."""
        joined = torch.cat([self.indices(rank) for rank in range(self.ranks)])
        inverse = torch.empty_like(joined)
        inverse[joined] = torch.arange(len(joined))
        return inverse

    def _piece(self, chunk: int, rank: int) -> tuple[int, int]:
        pieces = self.pieces(chunk)
        begin = self.edges[chunk] + sum(pieces[:rank])
        return begin, begin + pieces[rank]
