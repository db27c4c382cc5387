"""Who asks for how much, and when: everything follows from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.engines import Request, Sampling
from core.errors import SettingsError

SPREAD = 0.3
"""Standard deviation of lengths, as a share of their mean (arXiv 2401.08671, section 4)."""
_LEAST_PROMPT, _LEAST_ANSWER = 8, 4


@dataclass(frozen=True)
class Lengths:
    """Prompts and answers of normally distributed lengths, none above twice the mean.

    Args:
        prompt: mean number of prompt tokens.
        answer: mean number of generated tokens.
    """

    prompt: int
    answer: int

    def __post_init__(self) -> None:
        if self.prompt < _LEAST_PROMPT or self.answer < _LEAST_ANSWER:
            raise SettingsError(
                f"prompts of {self.prompt} and answers of {self.answer} tokens measure nothing",
                fix=f"at least {_LEAST_PROMPT} and {_LEAST_ANSWER}",
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and the longest answer together."""
        return 2 * (self.prompt + self.answer)


@dataclass(frozen=True)
class Query:
    """One question.

    Args:
        prompt: token ids.
        answer: tokens to generate, exactly.
    """

    prompt: Sequence[int]
    answer: int

    def request(self) -> Request:
        """As engines want it: greedy, ended by its length alone."""
        return Request(prompt=self.prompt, sampling=Sampling(max_new_tokens=self.answer))


class Load(Protocol):
    """Queries, and when they are asked."""

    @property
    def queries(self) -> Sequence[Query]:
        """All of them, in the order in which they are asked."""
        ...

    @property
    def clients(self) -> int:
        """Clients that wait for one answer before they ask again; 0 where nobody waits."""
        ...

    def begin(self) -> Iterator[tuple[int, float]]:
        """Queries that are asked whatever happens: index and second."""
        ...


@dataclass(frozen=True)
class OpenLoop:
    """Queries arrive by chance, however long the answers take.

    Args:
        queries: what is asked.
        arrivals: second of each.
    """

    queries: Sequence[Query]
    arrivals: Sequence[float]
    clients: int = 0

    def begin(self) -> Iterator[tuple[int, float]]:
        return enumerate(self.arrivals)


@dataclass(frozen=True)
class ClosedLoop:
    """Clients of which each asks again as soon as it is answered.

    Args:
        queries: what is asked, by whoever is free.
        clients: how many there are.
        stagger: seconds between their first queries.
    """

    queries: Sequence[Query]
    clients: int
    stagger: float = 0.0

    def begin(self) -> Iterator[tuple[int, float]]:
        first = min(self.clients, len(self.queries))
        return ((index, index * self.stagger) for index in range(first))


def poisson(lengths: Lengths, count: int, rate: float, vocabulary: int, seed: int) -> OpenLoop:
    """Arrivals of a Poisson process of ``rate`` queries a second, the first one at 0.

    Example:
        >>> load = poisson(Lengths(300, 40), 20, 1.0, 1000, seed=0)
        >>> len(load.queries), load.arrivals[0]
        (20, 0.0)
    """
    pauses = np.random.default_rng([seed, 1]).exponential(1 / rate, count - 1)
    arrivals = np.concatenate([[0.0], np.cumsum(pauses)])
    return OpenLoop(queries(lengths, count, vocabulary, seed), arrivals.tolist())


def closed(
    lengths: Lengths, count: int, clients: int, vocabulary: int, seed: int, stagger: float = 0.0
) -> ClosedLoop:
    """``clients`` that ask ``count`` queries in all."""
    return ClosedLoop(queries(lengths, count, vocabulary, seed), clients, stagger)


def queries(lengths: Lengths, count: int, vocabulary: int, seed: int) -> list[Query]:
    """Slices of one text of random tokens; query ``i`` begins at its token ``i``.

    No two prompts begin alike, so a prefix cache finds nothing.
    """
    random = np.random.default_rng([seed, 0])
    text = random.integers(3, vocabulary, 2 * lengths.prompt + count).tolist()
    prompts = _lengths(random, lengths.prompt, count, _LEAST_PROMPT)
    answers = _lengths(random, lengths.answer, count, _LEAST_ANSWER)
    both = enumerate(zip(prompts, answers, strict=True))
    return [Query(text[index : index + prompt], answer) for index, (prompt, answer) in both]


def _lengths(random: np.random.Generator, mean: int, count: int, least: int) -> list[int]:
    drawn = random.normal(mean, SPREAD * mean, count)
    found: list[int] = np.clip(drawn, least, 2 * mean).astype(int).tolist()
    return found
