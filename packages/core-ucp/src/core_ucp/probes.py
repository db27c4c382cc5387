"""What ``core doctor`` and ``core bench`` say of converting checkpoints on this machine."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save

from core import Reading
from core.disk import nearest_existing
from core.storage import new_folder
from core_ucp.execution.copying import execute
from core_ucp.execution.digest import digest_of
from core_ucp.execution.planning import BLOCK, plan
from core_ucp.sources.registry import open_checkpoint
from core_ucp.targets.universal import build

if TYPE_CHECKING:
    from core import Run

_REPEATS = 5
_TENSORS = 8
_LEAST = 0.5
"""GB/s of digests below which they hold a conversion up on most disks."""


def digests(run: Run) -> Iterator[Reading]:
    """How fast one processor computes digests, against copying the same memory."""
    block, copy = np.ones(BLOCK, np.uint8), np.ones(BLOCK, np.uint8)
    ways = {"digest": lambda: digest_of(block), "copy": lambda: np.copyto(copy, block)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(9):
        for name, work in ways.items():
            seconds[name].append(_seconds(work))
    speed = BLOCK / statistics.median(seconds["digest"]) / 1e9
    ratio = statistics.median(seconds["copy"]) / statistics.median(seconds["digest"])
    yield Reading(
        name="digests",
        status="ok" if speed >= _LEAST else "warn",
        value=speed,
        unit="GB/s",
        limit=f"at least {_LEAST}; {ratio:.2f} of the speed of a copy",
        advice="" if speed >= _LEAST else "conversions will be slower than the disk",
    )


def conversion(run: Run, size: int = 2**28) -> Iterator[Reading]:
    """A DCP folder to a universal one, against ``cp`` and torch's ``dcp_to_torch_save``.

    Args:
        run: whose folder says which disk.
        size: bytes of tensors.
    """
    state = {str(index): torch.randn(size // 4 // _TENSORS) for index in range(_TENSORS)}
    with tempfile.TemporaryDirectory(dir=nearest_existing(run.folder)) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        save(state, checkpoint_id=source, no_dist=True)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: _convert(source, target),
            "cp": lambda: _synced(shutil.copytree(source, target)),
            "dcp_to_torch_save": lambda: _saved(source, target),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(_REPEATS):
            for way, work in ways.items():
                seconds[way].append(_seconds(work))
                shutil.rmtree(target)
    for way in ("cp", "dcp_to_torch_save"):
        pairs = zip(seconds[way], seconds["ours"], strict=True)
        yield Reading(
            name=f"{size / 2**20:.0f} MiB of DCP to universal, against {way}",
            status="ok",
            value=statistics.median(other / ours for other, ours in pairs),
            unit="x",
            limit=f"ratio of speeds, durable, median of {_REPEATS} interleaved runs",
        )


def _convert(source: Path, target: Path) -> None:
    view = open_checkpoint(source)
    made = plan(view, build(view))
    with new_folder(target) as folder:
        execute(made, folder)


def _saved(source: Path, target: Path) -> None:
    target.mkdir()
    dcp_to_torch_save(source, target / "whole.pt")
    _synced(target)


def _synced(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
