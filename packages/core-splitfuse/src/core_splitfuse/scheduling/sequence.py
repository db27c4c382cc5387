"""A request as the scheduler sees it: tokens that are known, and how many of them are computed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """Tokens of one request, or of one of its samples.

    There are no phases: what is left to run is ``need``. One token left is a decode, more are a
    prompt, or tokens whose keys and values were given up.

    Args:
        id: unique number.
        tokens: prompt and everything generated.
        prompt: length of the prompt.
        limit: tokens that may be generated.
        priority: higher ones are admitted first.
        atomic: the prompt has to be computed in one pass, and nothing of it taken from a cache.
        salt: what keys and values depend on beside the tokens; no cached prefix without one.
    """

    id: int
    tokens: list[int]
    prompt: int
    limit: int
    priority: int = 0
    atomic: bool = False
    salt: str | None = None
    computed: int = 0
    table: list[int] = field(default_factory=list)
    admission: int = -1
    passed_over: int = 0
    evictions: int = 0
    sealed: int = 0

    @property
    def need(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed

    @property
    def longest(self) -> int:
        """Tokens of which keys and values are kept when the request reaches its limit."""
        return self.prompt + self.limit - 1

    @property
    def admitted(self) -> bool:
        """Whether it may own blocks."""
        return self.admission >= 0


@dataclass(frozen=True)
class Chunk:
    """Tokens ``begin`` to ``end`` of a sequence, computed in one pass.

    Args:
        sequence: whose they are.
        begin: the first one; everything before is computed.
        end: one past the last.
    """

    sequence: Sequence
    begin: int
    end: int

    @property
    def tokens(self) -> list[int]:
        """Token ids."""
        return self.sequence.tokens[self.begin : self.end]

    @property
    def samples(self) -> bool:
        """Whether the last one has no successor yet, so that one is drawn."""
        return self.end == len(self.sequence.tokens)

    def __len__(self) -> int:
        return self.end - self.begin
