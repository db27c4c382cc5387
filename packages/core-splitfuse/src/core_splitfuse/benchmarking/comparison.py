"""Peers under the same loads, one after the other, in several rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from core_splitfuse.benchmarking.clock import Clock
from core_splitfuse.benchmarking.driver import Record, drive
from core_splitfuse.benchmarking.effective import RATES
from core_splitfuse.benchmarking.figures import Figures, figures, median
from core_splitfuse.benchmarking.peers.peer import MissingPeerError, Opened, Peer
from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.benchmarking.workload import Lengths, Load, closed

Tell = Callable[[str], None]
_WARM = 1_000_000
LoadOf = Callable[[int], Load]
"""Makes the load of a seed. Every load of every round has a seed of its own: a prompt that comes
again would be found in the prefix caches of those who have one."""


def silent(_: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Run:
    """One peer under one load in one round.

    Args:
        load: name of the load.
        peer: name of the peer.
        round: number of the round; runs of one round had the same queries.
        clients: clients in a closed loop; 0 where arrivals do not wait.
        records: what came when.
    """

    load: str
    peer: str
    round: int
    clients: int
    records: tuple[Record, ...]


@dataclass
class Comparison:
    """All runs.

    Args:
        runs: in the order in which they were made.
        missing: peers that could not be measured, and why.
        rates: of the promises that effective throughput is counted by.
    """

    runs: list[Run] = field(default_factory=list[Run])
    missing: dict[str, str] = field(default_factory=dict[str, str])
    rates: tuple[float, ...] = RATES

    @property
    def loads(self) -> list[str]:
        """Names of the loads."""
        return list(dict.fromkeys(run.load for run in self.runs))

    def peers(self, load: str) -> list[str]:
        """Names of the peers that were measured under a load."""
        return list(dict.fromkeys(run.peer for run in self.runs if run.load == load))

    def of(self, load: str, peer: str) -> dict[int, Figures]:
        """Figures by round."""
        found = (run for run in self.runs if (run.load, run.peer) == (load, peer))
        return {run.round: figures(run.records, self.rates) for run in found}

    def median(self, load: str, peer: str) -> Figures:
        """Median of the rounds."""
        return median(list(self.of(load, peer).values()))

    def ratio(self, load: str, figure: str, ours: str, theirs: str) -> float | None:
        """Median, over the rounds that both were measured in, of ours over theirs.

        Returns:
            ``None`` where there is no such round.
        """
        mine, other = self.of(load, ours), self.of(load, theirs)
        pairs = [(mine[turn], other[turn]) for turn in mine if turn in other]
        if not pairs:
            return None
        return statistics.median(float(getattr(a, figure) / getattr(b, figure)) for a, b in pairs)


def compare(
    peers: Sequence[Peer],
    loads: Mapping[str, LoadOf],
    subject: Subject,
    *,
    rounds: int = 1,
    rates: Sequence[float] = RATES,
    warm: Lengths | None = None,
    tell: Tell = silent,
) -> Comparison:
    """Measure all peers under all loads, in turn.

    Within a round each load is served by one peer after the other, and every round begins with
    another peer, so that what slows the machine down meets all of them.

    Args:
        peers: who is measured; one that is not installed is named in the result.
        loads: by name.
        subject: the model.
        rounds: how often.
        rates: tokens a second that effective throughput promises.
        warm: lengths of a few queries that every peer answers first.
        tell: is told how it goes.
    """
    found = Comparison(rates=tuple(rates))
    with _opened(peers, subject, found, tell) as ready:
        for peer, opened in ready:
            if warm is not None:
                first = closed(warm, 3, 3, subject.vocabulary, seed=_WARM)
                drive(opened.engine, first, Clock(opened.seconds))
            tell(f"{peer.name} is ready")
        for turn in range(rounds):
            for index, (name, load_of) in enumerate(loads.items()):
                load = load_of(turn * len(loads) + index)
                _round(turn, name, load, ready, found, tell)
    return found


def _round(
    turn: int,
    name: str,
    load: Load,
    ready: Sequence[tuple[Peer, Opened]],
    found: Comparison,
    tell: Tell,
) -> None:
    first = turn % max(1, len(ready))
    for peer, opened in (*ready[first:], *ready[:first]):
        if (peer.once and turn) or (peer.loads and name not in peer.loads):
            continue
        records = drive(opened.engine, load, Clock(opened.seconds))
        run = Run(name, peer.name, turn, load.clients, tuple(records))
        found.runs.append(run)
        got = figures(records, found.rates)
        tell(f"{turn + 1}: {name}, {peer.name}: p95 {got.gap95:.3f} s, {got.tokens:.1f} tokens/s")


@contextmanager
def _opened(
    peers: Sequence[Peer], subject: Subject, found: Comparison, tell: Tell
) -> Generator[list[tuple[Peer, Opened]]]:
    """Open who is there, and close all of them in the end."""
    ready: list[tuple[Peer, Opened]] = []
    try:
        for peer in peers:
            try:
                ready.append((peer, peer.open(subject)))
            except MissingPeerError as missing:
                found.missing[peer.name] = "; ".join(
                    filter(None, (missing.what, missing.why, missing.fix))
                )
                tell(f"{peer.name} is not measured: {found.missing[peer.name]}")
        yield ready
    finally:
        for _, opened in ready:
            opened.engine.close()
