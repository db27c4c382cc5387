"""Which heads every rank attends with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from core.errors import ModelError


@dataclass(frozen=True)
class HeadPlan:
    """Heads of queries shared by ranks, with the heads of keys and values that they read.

    Every rank gets neighbouring heads of queries, as many as any other or one less, and all heads of
    keys that these read; a head of keys may go to several ranks (Ulysses, for any number of heads).

    Args:
        heads: heads of queries.
        kv_heads: heads of keys and values; divides ``heads``.
        ranks: number of ranks.

    Raises:
        ModelError: for more ranks than heads of queries.

    Example:
        >>> plan = HeadPlan(heads=6, kv_heads=2, ranks=4)
        >>> [plan.queries(rank) for rank in range(4)]
        [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
        >>> [plan.keys(rank) for rank in range(4)]
        [range(0, 1), range(0, 2), range(1, 2), range(1, 2)]
    """

    heads: int
    kv_heads: int
    ranks: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys do not divide {self.heads} of queries")
        if self.ranks > self.heads:
            raise ModelError(
                f"{self.ranks} ranks cannot share the {self.heads} attention heads of a layer",
                why="every rank attends with at least one head",
                fix=f"let {self.heads} ranks at most share a sequence",
            )

    def queries(self, rank: int) -> range:
        """Heads of queries of a rank."""
        each, more = divmod(self.heads, self.ranks)
        begin = rank * each + min(rank, more)
        return range(begin, begin + each + (rank < more))

    def keys(self, rank: int) -> range:
        """Heads of keys and values that the queries of a rank read."""
        own, group = self.queries(rank), self.heads // self.kv_heads
        return range(own[0] // group, own[-1] // group + 1)

    def repeats(self, rank: int) -> tuple[int, ...] | None:
        """How many heads of queries of a rank read each of its heads of keys.

        ``None`` where all are read by equally many, as kernels have it; otherwise keys and values
        have to be repeated, one for every head of queries.
        """
        group = self.heads // self.kv_heads
        readers = [head // group for head in self.queries(rank)]
        counts = tuple(readers.count(key) for key in self.keys(rank))
        return None if len(set(counts)) == 1 else counts


@lru_cache(maxsize=64)
def plan_heads(heads: int, kv_heads: int, ranks: int) -> HeadPlan:
    """The plan of a layer, made once."""
    return HeadPlan(heads, kv_heads, ranks)
