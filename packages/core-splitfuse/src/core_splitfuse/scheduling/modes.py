"""Other ways to pack passes, which Dynamic SplitFuse is compared with."""

from __future__ import annotations

from core_splitfuse.scheduling.blocks import BlockPool
from core_splitfuse.scheduling.scheduler import Pass, Scheduler
from core_splitfuse.scheduling.sequence import Chunk, Sequence
from core_splitfuse.settings import SplitFuseSettings


class PrefillFirst(Scheduler):
    """Whole prompts before any decode, as engines without splitting do it."""

    def schedule(self) -> Pass:
        made = Pass()
        self._prompts(made, self.settings.budget)
        if not made.chunks:
            self._decodes(made)
        return made

    def _cut(self, sequence: Sequence, room: int, made: Pass) -> int:
        """All of a prompt, or nothing; one that is longer than the budget goes alone."""
        if sequence.need > room and made.chunks:
            return 0
        return super()._cut(sequence, max(room, sequence.need), made)


class Paper(Scheduler):
    """The rules of DeepSpeed-FastGen: in order of arrival, one prompt cut, decodes that wait."""

    def _decodes(self, made: Pass) -> None:
        for sequence in [s for s in self.running if s.need == 1]:
            self._cut(sequence, self.settings.budget - made.tokens, made)

    def _prompts(self, made: Pass, room: int) -> None:
        for sequence in [s for s in self.running if s.need > 1]:
            room -= self._cut(sequence, room, made)
        while self.waiting and room > 0 and len(made.chunks) < self.settings.sequences:
            sequence = self.waiting[0]
            # All of it has to fit now, or nobody behind it is looked at.
            if self.pool.blocks_for(len(sequence.tokens)) > self.pool.available:
                break
            self._admit(self.waiting.pop(0))
            self._reuse(sequence)
            taken = self._cut(sequence, room, made)
            room = room - taken if taken else 0
        if not made.chunks and self.running:
            # Everybody waits for blocks of the others.
            self._evict(max(self.running, key=lambda s: s.admission))
            self._decodes(made)
            self._prompts(made, self._room(made))

    def _cut(self, sequence: Sequence, room: int, made: Pass) -> int:
        """Take what fits without taking blocks from others."""
        room = max(room, sequence.need) if sequence.atomic and not made.chunks else room
        count = min(sequence.need, room)
        while count > 0 and self._missing(sequence, count) > self.pool.available:
            count -= 1
        cut = sequence.atomic and count < sequence.need
        if count <= 0 or cut or len(made.chunks) >= self.settings.sequences:
            return 0
        self._reserve(sequence, count, made)
        made.chunks.append(Chunk(sequence, sequence.computed, sequence.computed + count))
        return count


MODES: dict[str, type[Scheduler]] = {
    "split": Scheduler,
    "paper": Paper,
    "prefill_first": PrefillFirst,
}


def make_scheduler(pool: BlockPool, settings: SplitFuseSettings) -> Scheduler:
    """Make the scheduler of ``settings.mode``."""
    return MODES[settings.mode](pool, settings)
