"""Whatever is asked for and in whatever order: the books balance and everybody gets an answer."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.errors import EngineError
from core_splitfuse.scheduling.blocks import BlockPool
from core_splitfuse.scheduling.modes import make_scheduler
from core_splitfuse.scheduling.scheduler import Pass
from core_splitfuse.scheduling.sequence import Sequence
from core_splitfuse.settings import SplitFuseSettings


def answer(sequence: Sequence) -> int:
    """The next token of a model that looks at the last three tokens."""
    return hash(tuple(sequence.tokens[-3:])) % 50


def alone(prompt: list[int], limit: int) -> list[int]:
    sequence = Sequence(0, list(prompt), len(prompt), limit)
    for _ in range(limit):
        sequence.tokens.append(answer(sequence))
    return sequence.tokens


class Serving(RuleBasedStateMachine):
    """Requests come and go while passes are made."""

    @initialize(
        blocks=st.integers(4, 40),
        size=st.integers(1, 8),
        budget=st.integers(1, 40),
        mode=st.sampled_from(["split", "split", "split", "paper", "prefill_first"]),
        partial=st.integers(1, 4),
        admission=st.sampled_from(["optimistic", "no_evict"]),
        sequences=st.integers(1, 8),
        latency=st.sampled_from([0.0, 0.0, 0.02, 0.2]),
    )
    def begin(self, blocks, size, budget, mode, partial, admission, sequences, latency):
        self.policy = SplitFuseSettings(
            budget=budget,
            mode=mode,
            partial_prompts=partial,
            admission=admission,
            sequences=sequences,
            latency=latency,
            ageing=3,
        )
        self.scheduler = make_scheduler(BlockPool(blocks, size), self.policy)
        self.open: dict[int, Sequence] = {}
        self.count = 0

    @rule(
        length=st.integers(1, 60),
        limit=st.integers(1, 12),
        alphabet=st.integers(1, 3),
        priority=st.integers(0, 1),
        salted=st.booleans(),
        atomic=st.booleans(),
    )
    def ask(self, length, limit, alphabet, priority, salted, atomic):
        self.count += 1
        prompt = [i % alphabet for i in range(length)]
        sequence = Sequence(
            self.count,
            prompt,
            length,
            limit,
            priority=priority,
            salt="same" if salted else None,
            atomic=atomic,
        )
        pool = self.scheduler.pool
        if pool.blocks_for(length + limit - 1) > pool.count:
            with pytest.raises(EngineError, match="do not fit"):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.open[sequence.id] = sequence

    @rule(data=st.data())
    def cancel(self, data):
        if self.open:
            number = data.draw(st.sampled_from(sorted(self.open)))
            self.scheduler.remove(self.open.pop(number))

    @rule(data=st.data())
    def fork(self, data):
        ready = [s for s in self.open.values() if s.admitted and s.need == 1]
        if not ready:
            return
        sequence = data.draw(st.sampled_from(ready))
        self.count += 1
        twin = Sequence(
            self.count, list(sequence.tokens), sequence.prompt, sequence.limit, salt=sequence.salt
        )
        self.scheduler.fork(sequence, twin)
        self.open[twin.id] = twin

    @rule()
    def weights_changed(self):
        self.scheduler.recompute()

    @rule(data=st.data())
    def frequencies_changed(self, data):
        if self.scheduler.running:
            sequence = data.draw(st.sampled_from(self.scheduler.running))
            salt = sequence.salt and data.draw(st.sampled_from(["same", "other"]))
            self.scheduler.restart(sequence, salt)

    @rule(times=st.integers(1, 5))
    def run(self, times):
        for _ in range(times):
            self.check(self.step())

    def step(self) -> Pass:
        before = {s.id: s.computed for s in self.scheduler.running}
        decodes = {s.id for s in self.scheduler.running if s.need == 1}
        made = self.scheduler.schedule()
        self.decodes = decodes & {s.id for s in self.scheduler.running}
        self.wanted = len(decodes)
        self.before = before
        for chunk in made.chunks:
            sequence = chunk.sequence
            assert chunk.begin == sequence.computed
            assert len(chunk) > 0
            assert len(sequence.table) * self.scheduler.pool.size >= chunk.end
            first, last = chunk.begin // self.scheduler.pool.size, (chunk.end - 1)
            for block in sequence.table[first : last // self.scheduler.pool.size + 1]:
                assert self.scheduler.pool.writable(block)
        if made.chunks:
            self.scheduler.cost.learn(made.load, 0.005 + 0.001 * made.tokens)
        for chunk in made.chunks:
            self.scheduler.computed(chunk)
            if chunk.samples:
                sequence = chunk.sequence
                sequence.tokens.append(answer(sequence))
                if len(sequence.tokens) == sequence.prompt + sequence.limit:
                    self.scheduler.remove(sequence)
                    del self.open[sequence.id]
                    assert sequence.tokens == alone(
                        sequence.tokens[: sequence.prompt], sequence.limit
                    )
        return made

    def check(self, made: Pass):
        ids = [chunk.sequence.id for chunk in made.chunks]
        assert len(ids) == len(set(ids)) <= self.policy.sequences
        whole = [c for c in made.chunks if c.sequence.atomic or self.policy.mode == "prefill_first"]
        if not whole:
            assert made.tokens <= self.policy.budget
        if self.policy.mode == "split":
            fit = min(self.policy.budget, self.policy.sequences) >= self.wanted
            assert not fit or self.decodes <= set(ids)
        if self.open:
            assert made.chunks, "somebody waits and nothing runs"

    @invariant()
    def books_balance(self):
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        owners = Counter(b for s in self.open.values() for b in s.table)
        assert all(pool.references(b) == owners[b] for b in range(pool.count))
        assert pool.owned == len(owners)
        assert pool.owned + pool.available == pool.count
        for sequence in self.open.values():
            assert (sequence in self.scheduler.running) == sequence.admitted
            assert (sequence in self.scheduler.waiting) != sequence.admitted
            assert 0 <= sequence.computed < len(sequence.tokens)
            assert len(sequence.table) >= pool.blocks_for(sequence.computed)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.open:
                break
            self.check(self.step())
        assert not self.open, "not everybody was answered"
        assert self.scheduler.pool.owned == 0


Serving.TestCase.settings = settings(max_examples=2000, stateful_step_count=30, deadline=None)
TestServing = Serving.TestCase


def test_a_long_prompt_is_not_passed_over_for_ever() -> None:
    """Short prompts keep coming, two in every pass; the long one advances all the same."""
    settings = SplitFuseSettings(budget=16, ageing=4)
    scheduler = make_scheduler(BlockPool(4000, 4), settings)
    long = Sequence(0, [1] * 400, 400, 1)
    scheduler.add(long)
    for number in range(1, 1200, 2):
        for twin in (number, number + 1):
            scheduler.add(Sequence(twin, [2] * 8, 8, 1))
        for chunk in scheduler.schedule().chunks:
            scheduler.computed(chunk)
            if chunk.samples:
                scheduler.remove(chunk.sequence)
        if long.admission < 0 and long.computed == 0 and number > 1:
            break
    assert number < 1100
