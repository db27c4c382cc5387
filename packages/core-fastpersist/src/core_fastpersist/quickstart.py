"""The step of this package in core's quickstart: a checkpoint after every training step."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from core import Row
from core.checkpoints.manager import Checkpoints
from core.errors import CheckpointError
from core.recipes.optim import build_optimizers
from core.recipes.settings import TrainSettings
from core.recipes.tokens import Order
from core.recipes.train import loss_of
from core_fastpersist.bench.overhead import Overhead, measure

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from core import Run
    from core.recipes.quickstart import Tour

OURS, STOCK = "fastpersist", "dcp"


def every_step(run: Run, tour: Tour) -> Iterator[Row]:
    """Train a copy of the model on, with and without checkpoints, and read the last one back.

    Raises:
        CheckpointError: when what is read is not what was saved.
    """
    wanted = run.settings(TrainSettings)
    model = copy.deepcopy(tour.model).train()
    optimizers = build_optimizers(model, wanted)
    state = {"model": model, **optimizers}
    order = Order(tour.data.training, wanted.batch_size, wanted.seed)
    steps = iter(range(10**9))

    def step() -> None:
        loss_of(model, order.batch(next(steps)), run, wanted).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    folder = tour.folder / "every-step"
    shutil.rmtree(folder, ignore_errors=True)
    threads = torch.get_num_threads()
    try:
        # As the run trains, and with a processor left free: where torch occupies all of them,
        # whatever else runs holds its threads up at each barrier.
        for used in dict.fromkeys((threads, max(1, threads - 1))):
            torch.set_num_threads(used)
            place = folder / f"{used}-threads"
            found = measure(run, state, step, (OURS, STOCK), place, rounds=9, steps=4)
            yield _overhead_row(found, used, threads)
    finally:
        torch.set_num_threads(threads)
    yield _read_back(run, model, state, folder / "last")
    shutil.rmtree(folder)


def _overhead_row(found: Overhead, used: int, threads: int) -> Row:
    knee = found.knee(OURS)
    fits = "fits: " if knee <= 1 else "does not fit: "
    return Row(
        what="a checkpoint after every step, time of a step",
        ours=f"{found.wall(OURS):+.1%}",
        plain=f"{found.wall(STOCK):+.1%}",
        note=f"plain way: core's {STOCK}; {found.nbytes[OURS] / 2**20:.1f} MiB, {fits}writing takes"
        f" {knee:.2f} of a step of {1000 * found.step():.0f} ms; torch uses {used} of {threads} threads",
    )


def _read_back(run: Run, model: nn.Module, state: Mapping[str, object], folder: Path) -> Row:
    saver = Checkpoints(run, folder, format=OURS)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = saver.save(state, 1).durable()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.load(state, path)
    saver.close()
    same = [torch.equal(wanted[name], tensor) for name, tensor in model.state_dict().items()]
    if not all(same):
        raise CheckpointError(f"{path} does not hold what was saved")
    return Row(what="tensors read back bit for bit", ours=f"{sum(same)} of {len(same)}")
