"""Serving without a model: the scheduler, and a published curve of what passes cost.

Deterministic, and the same driver and figures as real measurements. The curve is the figure of
forward latency by tokens in DeepSpeed-FastGen (arXiv 2401.08671, section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.engines import Request, Token
from core_splitfuse.benchmarking.clock import Clock
from core_splitfuse.benchmarking.comparison import Comparison, Run, Tell, silent
from core_splitfuse.benchmarking.driver import drive
from core_splitfuse.benchmarking.workload import Lengths, closed
from core_splitfuse.scheduling.blocks import BlockPool
from core_splitfuse.scheduling.cost import Load
from core_splitfuse.scheduling.modes import make_scheduler
from core_splitfuse.scheduling.sequence import Sequence as Tokens
from core_splitfuse.settings import SplitFuseSettings

_BLOCKS, _BLOCK = 20_000, 16


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass: a line through points, beyond the last of which it rises in proportion.

    Args:
        tokens: of the points, ascending.
        seconds: at those.
        per_key: seconds more for each token whose keys and values are read.
    """

    tokens: Sequence[int]
    seconds: Sequence[float]
    per_key: float

    def cost(self, load: Load) -> float:
        """Seconds of a pass of this load."""
        read = self.per_key * load.context
        if load.tokens > self.tokens[-1]:
            return self.seconds[-1] * load.tokens / self.tokens[-1] + read
        return float(np.interp(load.tokens, self.tokens, self.seconds)) + read


PAPER = Curve(
    tokens=(0, 64, 512, 768, 1024, 2048),
    seconds=(0.022, 0.022, 0.068, 0.094, 0.130, 0.257),
    per_key=5e-8,
)
"""Llama 2 70B on four A100 of 80 GB, as published."""

WAYS: Mapping[str, SplitFuseSettings] = {
    "splitfuse 768": SplitFuseSettings(budget=768),
    "0.2 s a pass": SplitFuseSettings(budget=2048, latency=0.2),
    "paper's rules 768": SplitFuseSettings(budget=768, mode="paper"),
    "prefill first": SplitFuseSettings(budget=2048, mode="prefill_first"),
}
"""What the tool simulates."""


class SimulatedEngine:
    """Serves with a scheduler and a curve.

    Args:
        settings: how passes are packed.
        curve: what passes cost.
    """

    def __init__(self, settings: SplitFuseSettings, curve: Curve = PAPER) -> None:
        self._curve = curve
        self._scheduler = make_scheduler(BlockPool(_BLOCKS, _BLOCK), settings)
        self._ids = itertools.count()
        self._time = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def seconds(self) -> float:
        """What all passes cost so far."""
        return self._time

    def add(self, request: Request) -> int:
        number = next(self._ids)
        prompt, limit = list(request.prompt), request.sampling.max_new_tokens
        self._scheduler.add(Tokens(number, prompt, len(prompt), limit))
        return number

    def step(self) -> list[Token]:
        made = self._scheduler.schedule()
        cost = self._curve.cost(made.load)
        self._scheduler.cost.learn(made.load, cost)
        self._time += cost
        for chunk in made.chunks:
            self._scheduler.computed(chunk)
        return [self._draw(chunk.sequence) for chunk in made.chunks if chunk.samples]

    def close(self) -> None:
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            self._scheduler.remove(sequence)

    def _draw(self, sequence: Tokens) -> Token:
        sequence.tokens.append(0)
        ended = len(sequence.tokens) == sequence.prompt + sequence.limit
        if ended:
            self._scheduler.remove(sequence)
        return Token(request=sequence.id, id=0, finish="length" if ended else None)


def simulate(
    ways: Mapping[str, SplitFuseSettings],
    clients: Sequence[int],
    *,
    lengths: Lengths,
    requests: int = 200,
    seed: int = 0,
    curve: Curve = PAPER,
    tell: Tell = silent,
) -> Comparison:
    """Serve closed loops of several numbers of clients packed in several ways.

    Args:
        ways: to pack passes, by name.
        clients: numbers of clients.
        lengths: of prompts and answers.
        requests: queries in each run.
        seed: of lengths.
        curve: what passes cost.
        tell: is told how it goes.
    """
    found = Comparison()
    for count in clients:
        load = closed(lengths, requests, count, vocabulary=100, seed=seed)
        for name, settings in ways.items():
            engine = SimulatedEngine(settings, curve)
            records = drive(engine, load, Clock(engine.seconds))
            found.runs.append(Run(f"{count} clients", name, 0, count, tuple(records)))
        tell(f"{count} clients simulated")
    return found
