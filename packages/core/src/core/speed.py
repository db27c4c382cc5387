"""Core's own benchmarks: what its machinery costs, as ratios of one run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contributions import Reading, Stage, Transform
from core.disk import nearest_existing
from core.plan import Plan
from core.plugins import Contributed

if TYPE_CHECKING:
    from core.run import Run

_REPEATS = 5
_SUBJECT: Stage[Any] = Stage("benchmark")


def checkpoints(run: Run) -> Iterator[Reading]:
    """A checkpoint of 64 MiB through the run's format against ``torch.save`` with fsync."""
    import torch

    from core.checkpoints.manager import Checkpoints

    state = {f"t{index}": torch.randn(2**21) for index in range(8)}
    ours: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory(dir=nearest_existing(run.folder)) as name:
        folder = Path(name)
        saver = Checkpoints(run, folder / "core")
        for repeat in range(_REPEATS):
            with _stopwatch(ours):
                saver.save(state, repeat).durable()
            with _stopwatch(plain):
                _torch_save(state, folder / f"{repeat}.pt")
        saver.close()
        chosen = saver.format().value.name
    yield Reading(
        name=f"save of 64 MiB as {chosen}, durable",
        status="ok",
        value=statistics.median(plain) / statistics.median(ours),
        unit="x",
        limit=f"speed against torch.save and fsync, median of {_REPEATS} interleaved saves",
    )


def hooks(run: Run) -> Iterator[Reading]:
    """One event to all plugins, and a plan of 100 transforms, against a plain Python call."""
    from core.events import StepEnded

    event = StepEnded(step=1)
    call = _per_call(lambda: _nothing(run, event))
    yield Reading(
        name="event to all observers",
        status="ok",
        value=_per_call(lambda: run.emit(event)) / call,
        unit="x",
        limit=f"of a plain call, with {len(run.plugins.active)} active plugins",
    )
    many = [
        Contributed("demo", Transform(stage=_SUBJECT, name=f"t{index}", apply=_nothing))
        for index in range(100)
    ]
    chained = [_after(item, index) for index, item in enumerate(many)]
    yield Reading(
        name="plan of 100 chained transforms",
        status="ok",
        value=_per_call(lambda: Plan.build(chained), 20) / call,
        unit="x",
        limit="of a plain call",
    )


def _after(item: Contributed[Transform[Any]], index: int) -> Contributed[Transform[Any]]:
    after = (f"demo.t{index - 1}",) if index else ()
    return Contributed(item.plugin, replace(item.value, after=after))


def _nothing(subject: Any, run: Any) -> Any:
    return subject


def _torch_save(state: dict[str, Any], path: Path) -> None:
    import torch

    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _stopwatch(seconds: list[float]) -> Generator[None]:
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def _per_call(work: Callable[[], object], calls: int = 2000) -> float:
    """Median over five rounds of the processor seconds of one call."""
    rounds = []
    for _ in range(_REPEATS):
        began = time.process_time()
        for _ in range(calls):
            work()
        rounds.append((time.process_time() - began) / calls)
    return max(statistics.median(rounds), 1e-9)
