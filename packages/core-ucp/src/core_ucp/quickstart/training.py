"""A few steps of the quickstart's training, from a checkpoint, on this process or on more ranks."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import start
from core.checkpoints.manager import Checkpoints
from core.contributions import MODEL
from core.distributed import Ranks
from core.errors import CheckpointError
from core.recipes.models import build_model
from core.recipes.optim import build_optimizers, build_schedulers
from core.recipes.parallel import clip, mean_over_ranks, parallelize
from core.recipes.settings import TrainSettings
from core.recipes.tokens import Order
from core.recipes.train import loss_of


@dataclass(frozen=True)
class Leg:
    """A part of a run: where it starts, and how far it goes.

    Attributes:
        settings: the run's ``settings.json``.
        vocabulary: size of the tokenizer.
        training: (sequences, length) token ids, int64.
        source: checkpoint of any format that it starts from.
        steps: optimizer steps.
        folder: that the checkpoint at its end is saved into.
    """

    settings: Path
    vocabulary: int
    training: Tensor
    source: Path
    steps: int
    folder: Path


def train(leg: Leg, ranks: Ranks | None = None) -> list[float]:
    """Train on from a checkpoint and save at the end; all ranks call it together.

    Returns:
        the loss of every step, in nats per token.
    """
    with start(leg.settings, folder=leg.folder / "run", quiet=True, ranks=ranks) as run:
        wanted = run.settings(TrainSettings)
        config = {"vocab_size": leg.vocabulary, **wanted.config} if ":" in wanted.model else {}
        model = run.apply(MODEL, build_model(run, wanted.model, config).to(run.device))
        model = parallelize(model, run, "fsdp2").train()
        optimizers = build_optimizers(model, wanted)
        schedulers = build_schedulers(optimizers, wanted)
        state = {"model": model, **optimizers, **schedulers}
        saver = Checkpoints(run, leg.folder)
        done = saver.load(state, leg.source).step
        order = Order(leg.training, wanted.batch_size, wanted.seed)
        losses = []
        for step in range(done + 1, done + leg.steps + 1):
            rows = order.batch(step - 1).view(run.world_size, -1, leg.training.shape[1])
            loss = loss_of(model, rows[run.rank], run, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(mean_over_ranks(loss.detach(), run))
            clip(model, wanted.clip)
            for optimizer, scheduler in zip(optimizers.values(), schedulers.values(), strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        saver.save(state, done + leg.steps).durable()
        saver.close()
    return losses


def train_on_ranks(leg: Leg, world_size: int) -> list[float]:
    """Train on several FSDP2 ranks, each a process of its own on this machine.

    Raises:
        CheckpointError: when a rank fails.
    """
    context = get_context("spawn")
    report = leg.folder / "losses.json"
    leg.folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(leg, rank, world_size, port, report))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise CheckpointError(
            f"rank {failed[0]} of {world_size} failed", why="see its traceback above"
        )
    losses: list[float] = json.loads(report.read_text())
    return losses


def _rank(leg: Leg, rank: int, world_size: int, port: int, report: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {**{k: str(v) for k, v in place.items()}, "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    losses = train(leg)
    if rank == 0:
        report.write_text(json.dumps(losses))
    sys.stdout.flush()
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


def plot(path: Path, first: int, curves: Sequence[tuple[str, int, list[float]]]) -> None:
    """Draw losses over steps.

    Args:
        path: image to write.
        first: step before the first one that is drawn, marked as the place of the checkpoint.
        curves: name, step before the first loss, losses.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    styles: list[dict[str, Any]] = [{"lw": 5, "alpha": 0.35}, {"marker": "o", "ms": 4}]
    for number, (name, before, losses) in enumerate(curves):
        steps = range(before + 1, before + 1 + len(losses))
        axes.plot(steps, losses, label=name, **styles[min(number, 1)])
    axes.axvline(first + 0.5, ls=":", color="grey")
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
