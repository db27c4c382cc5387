"""Asks an engine what a load wants asked, at the time of a clock, and notes when tokens come."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.engines import Request, Token
from core.errors import EngineError
from core_splitfuse.benchmarking.clock import Clock
from core_splitfuse.benchmarking.workload import Load


class Served(Protocol):
    """What is measured: the part of core's engine contract that serving takes."""

    @property
    def busy(self) -> bool:
        """Whether a request is queued or running."""
        ...

    def add(self, request: Request) -> int:
        """Queue a request and return its id."""
        ...

    def step(self) -> list[Token]:
        """Compute something, and return the tokens that came of it."""
        ...

    def close(self) -> None:
        """Give back everything."""


@dataclass
class Record:
    """One query and its answer.

    Args:
        prompt: number of prompt tokens.
        arrived: second in which it was asked.
        times: second of each token.
    """

    prompt: int
    arrived: float
    times: list[float] = field(default_factory=list[float])

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.arrived

    @property
    def ended(self) -> float:
        """Second of the last token."""
        return self.times[-1]

    @property
    def latency(self) -> float:
        """Seconds until the last token."""
        return self.ended - self.arrived

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def drive(engine: Served, load: Load, clock: Clock) -> list[Record]:
    """Serve a load to its end, and return the records in the order of the queries.

    Arrivals are noticed between two steps, as in a serving loop; a query counts from the moment it
    was asked.

    Raises:
        EngineError: when a request ends in another way than by its length.
    """
    gc.collect()
    coming = [(second, index) for index, second in load.begin()]
    heapq.heapify(coming)
    asked = len(coming)
    records = [Record(len(query.prompt), 0.0) for query in load.queries]
    running: dict[int, int] = {}
    while coming or engine.busy:
        if not engine.busy:
            clock.skip_to(coming[0][0])
        while coming and coming[0][0] <= clock.now():
            second, index = heapq.heappop(coming)
            records[index].arrived = second
            running[engine.add(load.queries[index].request())] = index
        made = engine.step()
        now = clock.now()
        ended = _note(made, records, running, now)
        if load.clients:
            more = min(ended, len(load.queries) - asked)
            for _ in range(more):
                heapq.heappush(coming, (now, asked))
                asked += 1
    _require_whole(records, load)
    return records


def _note(
    made: Sequence[Token], records: Sequence[Record], running: dict[int, int], now: float
) -> int:
    """Write down tokens, and return how many requests ended."""
    ended = 0
    for token in made:
        record = records[running[token.request]]
        if token.id >= 0:
            record.times.append(now)
        if token.finish is not None:
            if token.finish != "length":
                raise EngineError(f"a request ended with {token.finish!r} instead of its length")
            del running[token.request]
            ended += 1
    return ended


def _require_whole(records: Sequence[Record], load: Load) -> None:
    for index, (record, query) in enumerate(zip(records, load.queries, strict=True)):
        if len(record.times) != query.answer:
            raise EngineError(
                f"query {index} got {len(record.times)} tokens instead of {query.answer}"
            )
