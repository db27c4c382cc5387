"""What a checkpoint after every step costs a training loop, measured in blocks that take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoints.manager import Checkpoints
from core_fastpersist.bench.measuring import processor_seconds

if TYPE_CHECKING:
    from core import Run

PLAIN = "no checkpoints"


@dataclass(frozen=True)
class Block:
    """Seconds of one training step, and processor seconds, as means over a block."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Overhead:
    """Steps with a checkpoint after each against steps without.

    Args:
        blocks: by checkpoint format, and :data:`PLAIN`; in the order they were run.
        durable: median seconds from submit to durable when nothing else runs, by format.
        nbytes: bytes of a checkpoint, by format.
    """

    blocks: Mapping[str, tuple[Block, ...]]
    durable: Mapping[str, float]
    nbytes: Mapping[str, int]

    def wall(self, name: str) -> float:
        """Share of a step's time that saving adds: median over the pairs of neighbouring blocks."""
        pairs = zip(self.blocks[name], self.blocks[PLAIN], strict=True)
        return statistics.median(with_.seconds / none.seconds for with_, none in pairs) - 1

    def cpu(self, name: str) -> float:
        """Share of a step's processor time that saving adds in this process."""
        pairs = zip(self.blocks[name], self.blocks[PLAIN], strict=True)
        return statistics.median(with_.cpu / none.cpu for with_, none in pairs) - 1

    def step(self, name: str = PLAIN) -> float:
        """Median seconds of a step."""
        return statistics.median(block.seconds for block in self.blocks[name])

    def knee(self, name: str) -> float:
        """Time to write a checkpoint over the time of a step: hidden where it is below one.

        Decoupled checkpoints cost nothing as long as bytes <= bandwidth x step (FastPersist,
        arXiv 2406.13768).
        """
        return self.durable[name] / self.step()


def measure(
    run: Run,
    state: Mapping[str, Any],
    step: Callable[[], object],
    formats: tuple[str, ...],
    folder: Path,
    *,
    rounds: int = 6,
    steps: int = 8,
    tell: Callable[[str], None] = lambda text: None,
) -> Overhead:
    """Train in blocks: without checkpoints, and with one after every step in each format.

    Args:
        run: gives settings and formats.
        state: what is saved.
        step: one training step that changes ``state``.
        formats: names of checkpoint formats.
        folder: for the checkpoints; on the disk in question.
        rounds: blocks of each kind.
        steps: training steps in a block.
        tell: is told how it goes.
    """
    savers = {name: Checkpoints(run, folder / name, format=name) for name in formats}
    names = [PLAIN, *savers]
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    durable: dict[str, list[float]] = {name: [] for name in savers}
    done = 0
    try:
        for first in savers.values():  # early checkpoints allocate what later ones use again
            for _ in range(3):
                step()
                done += 1
                first.save(state, done).durable()
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                saver = savers.get(name)
                gc.collect()
                began, cpu = time.perf_counter(), processor_seconds()
                for _ in range(steps):
                    step()
                    done += 1
                    if saver is not None:
                        saver.save(state, done)
                if saver is not None:
                    saver.wait()
                seconds, used = time.perf_counter() - began, processor_seconds() - cpu
                blocks[name].append(Block(seconds / steps, used / steps))
                tell(f"{number + 1}/{rounds} {name}: {1000 * seconds / steps:.0f} ms a step")
            for name, alone in savers.items():
                done += 1
                began = time.perf_counter()
                alone.save(state, done).durable()
                durable[name].append(time.perf_counter() - began)
        return Overhead(
            {name: tuple(found) for name, found in blocks.items()},
            {name: statistics.median(found) for name, found in durable.items()},
            {name: _newest_bytes(folder / name) for name in savers},
        )
    finally:
        for open_one in savers.values():
            open_one.close()


def _newest_bytes(directory: Path) -> int:
    newest = max(directory.glob("step-*"))
    return sum(path.stat().st_size for path in newest.iterdir())
