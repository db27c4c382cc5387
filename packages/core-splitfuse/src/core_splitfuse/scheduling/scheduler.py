"""Dynamic SplitFuse: every forward pass gets the same number of tokens.

Decodes come first, prompts are cut and packed so that they fill what is left (DeepSpeed-FastGen,
arXiv 2401.08671, section 3). When memory runs out the newest request gives up its blocks and is
computed anew later; the oldest one never does, so that there is always progress.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field

from core.errors import EngineError
from core_splitfuse.scheduling.blocks import BlockPool, block_keys
from core_splitfuse.scheduling.cost import CostModel, Load
from core_splitfuse.scheduling.sequence import Chunk, Sequence
from core_splitfuse.settings import SplitFuseSettings

LEAST = 16
"""Tokens of prompts in every pass while some wait, whatever the time limit says."""


@dataclass
class Pass:
    """What one forward pass computes.

    Args:
        chunks: tokens of sequences; their blocks are taken.
        copies: blocks ``(from, to)`` whose content has to be copied first, because others go on
            reading the old ones.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return sum(map(len, self.chunks))

    @property
    def load(self) -> Load:
        """What it costs depends on this."""
        return Load(self.tokens, sum(c.end for c in self.chunks), len(self.chunks))

    def drop(self, sequence: Sequence) -> None:
        """Leave a sequence out after all."""
        self.chunks = [c for c in self.chunks if c.sequence is not sequence]
        self.copies = [c for c in self.copies if c[1] not in sequence.table]


class Scheduler:
    """Decides what runs next, and keeps the books of blocks.

    Args:
        pool: blocks of the key and value store.
        settings: rules; the budget is a number above 0.
    """

    def __init__(self, pool: BlockPool, settings: SplitFuseSettings | None = None) -> None:
        self.pool = pool
        self.settings = settings or SplitFuseSettings(budget=256)
        self.cost = CostModel()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.evictions = 0
        self.reused = 0
        self._admissions = itertools.count()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            EngineError: when it can never fit.
        """
        self.require_room(sequence)
        bisect.insort(self.waiting, sequence, key=_order)

    def require_room(self, sequence: Sequence) -> None:
        """Refuse a sequence that can never fit.

        Raises:
            EngineError: with both numbers.
        """
        if self.pool.blocks_for(sequence.longest) > self.pool.count:
            raise EngineError(
                f"{sequence.prompt} prompt tokens and {sequence.limit} new ones do not fit",
                why=f"the store holds {self.pool.count * self.pool.size} tokens",
                fix="ask for fewer tokens, or give the engine more memory",
            )

    def restart(self, sequence: Sequence, salt: str | None) -> None:
        """Let an admitted sequence be computed anew, under another salt."""
        self.running.remove(sequence)
        self._give_up(sequence)
        sequence.salt = salt
        bisect.insort(self.waiting, sequence, key=_order)

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Let ``twin`` go on from what ``sequence`` has computed; both own the blocks."""
        self.pool.share(sequence.table)
        twin.table, twin.computed = list(sequence.table), sequence.computed
        twin.sealed = sequence.sealed
        self._admit(twin)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended or was cancelled, wherever it is."""
        queue = self.running if sequence.admitted else self.waiting
        queue.remove(sequence)
        self._give_up(sequence)

    def schedule(self) -> Pass:
        """Choose the tokens of the next pass; empty when there is nothing to do."""
        made = Pass()
        self._decodes(made)
        self._prompts(made, self._room(made))
        return made

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk was computed, and let others find its full blocks."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        full = sequence.computed // self.pool.size
        if sequence.salt is None or full <= sequence.sealed:
            return
        keys = block_keys(sequence.tokens[: full * self.pool.size], self.pool.size, sequence.salt)
        for index in range(sequence.sealed, full):
            self.pool.seal(sequence.table[index], keys[index])
        sequence.sealed = full

    def recompute(self) -> None:
        """Give up all that was computed, as after a change of the weights or a failed pass."""
        for sequence in list(self.running):
            self._evict(sequence)
        self.pool.forget()

    def _decodes(self, made: Pass) -> None:
        ready = [s for s in self.running if s.need == 1]
        most = min(self.settings.budget, self.settings.sequences)
        if len(ready) > most:
            # Those that were left out longest go first.
            ready.sort(key=lambda s: (-s.passed_over, s.admission))
        for sequence in ready:
            if not sequence.admitted:
                continue  # an earlier one has taken its blocks
            if len(made.chunks) == most:
                sequence.passed_over += 1
            elif self._reserve(sequence, 1, made):
                sequence.passed_over = 0
                made.chunks.append(Chunk(sequence, sequence.computed, len(sequence.tokens)))

    def _room(self, made: Pass) -> int:
        """Tokens of prompts that go along."""
        room = self.settings.budget - made.tokens
        if self.settings.latency and self.cost.measured:
            allowed = self.cost.most_tokens(self.settings.latency, made.load, max(room, 0))
            room = min(room, max(allowed, LEAST))
        return room

    def _prompts(self, made: Pass, room: int) -> None:
        for sequence in self._candidates(room):
            taken = 0
            if len(made.chunks) < self.settings.sequences:
                taken = self._cut(sequence, room, made)
            room -= taken
            sequence.passed_over = 0 if taken else sequence.passed_over + 1

    def _candidates(self, room: int) -> list[Sequence]:
        """Prompts that share the room: the shortest first, unless one was passed over too often."""
        active = [s for s in self.running if s.need > 1]
        wanted = sum(s.need for s in active)
        while self.waiting and (len(active) < self.settings.partial_prompts or wanted < room):
            if not self._fits(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            self._admit(sequence)
            self._reuse(sequence)
            active.append(sequence)
            wanted += sequence.need
        aged = self.settings.ageing
        return sorted(active, key=lambda s: (s.passed_over < aged, s.need, s.admission))

    def _cut(self, sequence: Sequence, room: int, made: Pass) -> int:
        """Take what fits of a prompt, and return how many tokens that is."""
        count = min(sequence.need, room)
        if sequence.atomic and count < sequence.need:
            # It cannot be cut, so it goes alone among prompts, beyond the budget.
            if any(len(chunk) > 1 for chunk in made.chunks):
                return 0
            count = sequence.need
        if sequence is not self._oldest() and not sequence.atomic:
            slots = (len(sequence.table) + self.pool.available) * self.pool.size
            count = min(count, slots - sequence.computed)
        if count <= 0 or not self._reserve(sequence, count, made):
            return 0
        made.chunks.append(Chunk(sequence, sequence.computed, sequence.computed + count))
        return count

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can be admitted now."""
        if not self.running:
            return True
        if self.settings.admission == "no_evict":
            reached = [self.pool.blocks_for(s.longest) for s in (*self.running, sequence)]
            return sum(reached) <= self.pool.count
        blocks = self.pool.blocks_for
        promised = sum(max(blocks(len(s.tokens)) - len(s.table), 0) for s in self.running)
        spare = self.pool.available - promised - len(self.running)
        return blocks(len(sequence.tokens) + 1) <= spare

    def _reserve(self, sequence: Sequence, count: int, made: Pass) -> bool:
        """Take the blocks for ``count`` more tokens; newer sequences give up theirs if need be."""
        while self._missing(sequence, count) > self.pool.available:
            victim = max(self.running, key=lambda s: s.admission)
            made.drop(victim)
            self._evict(victim)
            if victim is sequence:
                return False
        for index in self._shared(sequence):
            old, (new,) = sequence.table[index], self.pool.take(1)
            made.copies.append((old, new))
            sequence.table[index] = new
            self.pool.release([old])
        sequence.table += self.pool.take(self._missing(sequence, count))
        return True

    def _missing(self, sequence: Sequence, count: int) -> int:
        """Blocks to take before ``count`` more tokens of a sequence can be computed."""
        more = self.pool.blocks_for(sequence.computed + count) - len(sequence.table)
        return max(more, 0) + len(self._shared(sequence))

    def _shared(self, sequence: Sequence) -> list[int]:
        """The place in the table of the block that is written next, when others read it, too."""
        index = sequence.computed // self.pool.size
        partly = sequence.computed % self.pool.size and index < len(sequence.table)
        return [index] if partly and not self.pool.writable(sequence.table[index]) else []

    def _oldest(self) -> Sequence:
        return min(self.running, key=lambda s: s.admission)

    def _admit(self, sequence: Sequence) -> None:
        sequence.admission = next(self._admissions)
        sequence.passed_over = 0
        self.running.append(sequence)

    def _reuse(self, sequence: Sequence) -> None:
        """Take over what is cached of a beginning; the last token is computed in any case."""
        if sequence.salt is None or sequence.atomic:
            return
        keys = block_keys(sequence.tokens[:-1], self.pool.size, sequence.salt)
        sequence.table = self.pool.match(keys)
        sequence.sealed = len(sequence.table)
        sequence.computed = sequence.sealed * self.pool.size
        self.reused += sequence.computed

    def _evict(self, sequence: Sequence) -> None:
        """Back to where it waited: ahead of all that came later."""
        self.running.remove(sequence)
        self._give_up(sequence)
        self.evictions += 1
        sequence.evictions += 1
        bisect.insort(self.waiting, sequence, key=_order)

    def _give_up(self, sequence: Sequence) -> None:
        self.pool.release(sequence.table)
        sequence.table, sequence.computed, sequence.sealed = [], 0, 0
        sequence.admission = -1


def _order(sequence: Sequence) -> tuple[int, int]:
    return -sequence.priority, sequence.id
