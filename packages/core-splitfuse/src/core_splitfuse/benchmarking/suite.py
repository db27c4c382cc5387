"""The standard measurements: the gates on one CPU core, and a sweep over clients."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core_splitfuse.benchmarking.comparison import Comparison, LoadOf, Tell, compare, silent
from core_splitfuse.benchmarking.effective import RATES
from core_splitfuse.benchmarking.gates import SATURATED, STEADY, Verdict, gates, judge
from core_splitfuse.benchmarking.peers.continuous import continuous
from core_splitfuse.benchmarking.peers.generate import one_by_one, padded
from core_splitfuse.benchmarking.peers.llama_cpp import llama_cpp
from core_splitfuse.benchmarking.peers.ours import prefill_first, splitfuse
from core_splitfuse.benchmarking.peers.peer import Peer
from core_splitfuse.benchmarking.peers.vllm import vllm
from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.benchmarking.workload import Lengths, closed, poisson
from core_splitfuse.settings import SplitFuseSettings

BUDGETS = (128, 2048)
"""Budgets of continuous batching: ours, and one that takes whole prompts."""
_SETTINGS = SplitFuseSettings(budget=128, pack_linears=True, kv_tokens=32_768)
_LENGTHS = Lengths(300, 40)
_WARM = 8


@dataclass(frozen=True)
class Suite:
    """What is measured with what.

    Args:
        subject: the model.
        settings: of our engine.
        lengths: of prompts and answers.
        requests: queries of each run.
        rounds: how often each peer serves each load.
        vllm_python: interpreter of an environment with vLLM.
        llama_python: interpreter of an environment with llama.cpp's binding.
        rates: tokens a second that effective throughput promises.
    """

    subject: Subject = field(default_factory=Subject)
    settings: SplitFuseSettings = _SETTINGS
    lengths: Lengths = _LENGTHS
    requests: int = 20
    rounds: int = 3
    vllm_python: str = sys.executable
    llama_python: str = sys.executable
    rates: tuple[float, ...] = RATES

    def peers(self) -> list[Peer]:
        """Everybody, ours first."""
        once = [continuous(budget, once=True) for budget in BUDGETS[1:]]
        return [
            splitfuse(self.settings),
            prefill_first(self.settings),
            continuous(BUDGETS[0]),
            vllm(self.settings.budget, self.vllm_python),
            llama_cpp(self.settings.budget, self.llama_python),
            *once,
            padded(),
            one_by_one((STEADY,)),
        ]

    def named(self, names: Sequence[str]) -> list[Peer]:
        """Those peers whose names begin with one of these; all of them without any."""
        return [p for p in self.peers() if not names or p.name.startswith(tuple(names))]

    def poisson(self, rate: float) -> LoadOf:
        """Queries that arrive by chance, ``rate`` a second."""
        vocabulary = self.subject.vocabulary
        return lambda seed: poisson(self.lengths, self.requests, rate, vocabulary, seed)

    def closed(self, clients: int, requests: int) -> LoadOf:
        """Clients in a closed loop; they start a tenth of a second apart."""
        vocabulary = self.subject.vocabulary
        return lambda seed: closed(self.lengths, requests, clients, vocabulary, seed, stagger=0.1)

    def gates(
        self, steady: float, saturated: float, names: Sequence[str] = (), tell: Tell = silent
    ) -> tuple[Comparison, list[Verdict]]:
        """Measure everybody under two loads, and judge.

        Args:
            steady: queries a second that can be answered as they come.
            saturated: more than can be.
            names: of peers, all without any.
            tell: is told how it goes.
        """
        loads = {STEADY: self.poisson(steady), SATURATED: self.poisson(saturated)}
        found = self.measure(loads, names, tell)
        first, whole, *others = (peer.name for peer in self.peers())
        batching = [name for name in others if name.startswith("transformers")]
        outside = next(name for name in others if name.startswith("vLLM"))
        return found, judge(found, first, gates(whole, batching, outside))

    def sweep(
        self,
        clients: Sequence[int],
        names: Sequence[str] = (),
        requests: int = 0,
        tell: Tell = silent,
    ) -> Comparison:
        """Closed loops of several numbers of clients.

        Args:
            clients: the numbers.
            names: of peers, all without any.
            requests: queries at each; the paper's four for each client and 32 more unless given.
            tell: is told how it goes.
        """
        loads = {
            f"{count} clients": self.closed(count, requests or 4 * count + 32) for count in clients
        }
        return self.measure(loads, names, tell)

    def measure(
        self, loads: Mapping[str, LoadOf], names: Sequence[str] = (), tell: Tell = silent
    ) -> Comparison:
        """Measure peers under loads of one's own."""
        return compare(
            self.named(names),
            loads,
            self.subject,
            rounds=self.rounds,
            rates=self.rates,
            warm=Lengths(self.lengths.prompt, _WARM),
            tell=tell,
        )
