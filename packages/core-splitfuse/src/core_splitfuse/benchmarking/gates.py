"""What the engine has to reach against its peers, as ratios of one interleaved measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core_splitfuse.benchmarking.comparison import Comparison

STEADY, SATURATED = "steady", "saturated"
"""Loads: queries that can be answered as they come, and more than that."""


@dataclass(frozen=True)
class Gate:
    """A ratio that has to hold.

    Args:
        load: under which load.
        figure: a field of :class:`~core_splitfuse.benchmarking.figures.Figures`.
        peer: whose figure divides ours.
        limit: what it is held against.
        at_most: whether the ratio may be the limit at most, or at least.
    """

    load: str
    figure: str
    peer: str
    limit: float
    at_most: bool = True

    @property
    def wanted(self) -> str:
        """The limit in words."""
        return f"{'at most' if self.at_most else 'at least'} {self.limit:.2f} x {self.peer}"


@dataclass(frozen=True)
class Verdict:
    """How a gate came out.

    Args:
        gate: what was wanted.
        got: the ratio; ``None`` where the peer was not measured.
    """

    gate: Gate
    got: float | None

    @property
    def holds(self) -> bool | None:
        """Whether it holds; ``None`` where nobody knows."""
        if self.got is None:
            return None
        gate = self.gate
        return self.got <= gate.limit if gate.at_most else self.got >= gate.limit


def gates(prefill_first: str, continuous: Sequence[str], vllm: str) -> list[Gate]:
    """All gates, by the names of the peers."""
    found: list[Gate] = []
    for load in (STEADY, SATURATED):
        found += [
            Gate(load, "gap99", prefill_first, 0.3),
            Gate(load, "tokens", prefill_first, 0.97, at_most=False),
        ]
    # With few at once, less than one gap in twenty meets somebody's prompt: p95 sees no stall then.
    found.append(Gate(SATURATED, "gap95", prefill_first, 0.55))
    for peer in continuous:
        found += [
            Gate(SATURATED, "tokens", peer, 1.3, at_most=False),
            Gate(SATURATED, "gap95", peer, 0.5),
        ]
    for load in (STEADY, SATURATED):
        found += [
            Gate(load, "gap50", vllm, 1.15),
            Gate(load, "gap95", vllm, 1.15),
            Gate(load, "tokens", vllm, 1 / 1.15, at_most=False),
            Gate(load, "first50", vllm, 1.5),
        ]
    return found


def judge(found: Comparison, ours: str, wanted: Sequence[Gate]) -> list[Verdict]:
    """Hold what was measured against what is wanted."""
    return [Verdict(gate, found.ratio(gate.load, gate.figure, ours, gate.peer)) for gate in wanted]
