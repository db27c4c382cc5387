"""Runs what the scheduler chose: chunks in, logits out, and a request that fails fails alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core_splitfuse.attention.spans import Span
from core_splitfuse.attention.store import Store
from core_splitfuse.engine.active import Active
from core_splitfuse.engine.runner import Runner
from core_splitfuse.scheduling.cost import CostModel
from core_splitfuse.scheduling.scheduler import Pass
from core_splitfuse.scheduling.sequence import Chunk

logger = logging.getLogger("core")


@dataclass
class Done:
    """What came of chunks.

    Args:
        computed: those that were computed.
        ended: those of them after which a token is drawn.
        logits: rows (vocabulary,) of these.
        failed: those that could not be computed.
    """

    computed: list[Chunk] = field(default_factory=list[Chunk])
    ended: list[Chunk] = field(default_factory=list[Chunk])
    logits: list[Tensor] = field(default_factory=list[Tensor])
    failed: list[Chunk] = field(default_factory=list[Chunk])


class Passes:
    """Runs passes through the model.

    Args:
        runner: calls the model.
        store: keys and values.
        cost: learns what passes cost.
    """

    def __init__(self, runner: Runner, store: Store, cost: CostModel) -> None:
        self.count = 0
        self._runner = runner
        self._store = store
        self._cost = cost

    def run(self, work: Pass, active: Mapping[int, Active]) -> Done:
        """Run a pass.

        Args:
            work: what to compute.
            active: the requests by number.
        """
        self.count += 1
        self._store.copy(work.copies)
        done = Done()
        begin = time.perf_counter()
        try:
            self._forward(work.chunks, active, done)
        except Exception:
            logger.exception("a pass with %d sequences failed", len(work.chunks))
            self._run_apart(work.chunks, active, done)
        else:
            self._cost.learn(work.load, time.perf_counter() - begin)
        return done

    def _run_apart(self, chunks: Sequence[Chunk], active: Mapping[int, Active], done: Done) -> None:
        """One request may be why a pass failed: alone it fails again, and the others do not."""
        for chunk in chunks:
            try:
                self._forward([chunk], active, done)
            except Exception:
                logger.exception("request %d failed", chunk.sequence.id)
                done.failed.append(chunk)

    def _forward(self, chunks: Sequence[Chunk], active: Mapping[int, Active], done: Done) -> None:
        ids: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            spans.append(_span(chunk, len(ids), active[chunk.sequence.id]))
            ids += chunk.tokens
            if chunk.samples:
                rows.append(len(ids) - 1)
        logits = self._runner.run(ids, spans, self._store, rows)
        if logits.device.type == "cuda":
            torch.cuda.synchronize(logits.device)  # else an error shows later, and in no pass
        done.computed += chunks
        done.ended += [chunk for chunk in chunks if chunk.samples]
        done.logits += logits.unbind()


def _span(chunk: Chunk, row: int, active: Active) -> Span:
    sequence = chunk.sequence
    return Span(
        row,
        chunk.begin,
        chunk.end,
        sequence.table,
        prompt=sequence.prompt,
        known=len(sequence.tokens),
        state=active.state,
        policy=active.extras.positions,
        begun=active.begun,
    )
