"""Runs of FSDP2 on CPU ranks that go on from a checkpoint of any framework, through ``run.load``."""

from __future__ import annotations

import json
import os
import socket
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from ucp.deepspeed_cases import Case
from ucp.deepspeed_models import BATCH, batch, build

import core
from core.distributed import Ranks


@dataclass(frozen=True)
class Went:
    """A run that went on.

    Attributes:
        losses: one per step, the mean over ranks.
        bytes_read: by rank, of tensors.
        remarks: of ``run.load``.
        saved: the checkpoint at its end, saved by ``run.save``.
    """

    losses: list[float]
    bytes_read: list[int]
    remarks: list[str]
    saved: Path


def go_on(case: Case, source: Path, folder: Path, *, world: int, steps: int) -> Went:
    """Load a checkpoint on some ranks under FSDP2, train on, and save.

    Args:
        case: that has saved the checkpoint; gives model, groups and precision.
        source: what it has saved, or what that was converted to.
        folder: for what the run leaves.
        world: number of ranks.
        steps: to train.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, case, source, folder, steps))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    errors = sorted(folder.glob("error-*.txt"))
    assert not errors, errors[0].read_text()
    assert [rank.exitcode for rank in ranks] == [0] * world
    facts = json.loads((folder / "facts.json").read_text())
    return Went(**{**facts, "saved": Path(facts["saved"])})


def _rank(
    rank: int, world: int, port: int, case: Case, source: Path, folder: Path, steps: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        _go_on(rank, case, source, folder, steps)
    except BaseException as error:
        import traceback

        (folder / f"error-{rank}.txt").write_text(f"{error}\n{traceback.format_exc()}")
        os._exit(1)  # the others wait for this rank in gloo
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


def _go_on(rank: int, case: Case, source: Path, folder: Path, steps: int) -> None:
    from core_ucp import reader

    counted: list[Any] = []
    start = reader.UniversalReader.__init__

    def watched(self: Any, *args: Any) -> None:
        start(self, *args)
        counted.append(self)

    reader.UniversalReader.__init__ = watched  # type: ignore[method-assign]
    settings = {"checkpoint": {"format": "dcp"}}
    with core.start(folder=folder / "run", quiet=True, **settings) as run:
        model = build(case)
        policy = MixedPrecisionPolicy()
        if case.precision != "fp32":
            half = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        world = run.world_size
        if world > 1:
            for block in getattr(model, "blocks", ()):
                fully_shard(block, mesh=run.mesh, mp_policy=policy)
            fully_shard(model, mesh=run.mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(_groups(model, case), lr=123.0)
        # DeepSpeed's schedule is constant here: it is carried along, and its counter goes on.
        schedule: dict[str, Any] = {}
        state = {"model": model, "optim": optimizer, "scheduler": schedule}
        loaded = run.load(state, source)
        losses = []
        for number in range(loaded.step, loaded.step + steps):
            tokens, labels = (part.chunk(world)[rank] for part in batch(number))
            loss = model(tokens, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(_mean(loss, run.ranks))
        schedule["last_batch_iteration"] += steps
        path = run.save(state, loaded.step + steps).durable()
        read = run.ranks.gather(sum(each.bytes_read for each in counted))
        facts = {
            "losses": losses,
            "bytes_read": read,
            "remarks": list(loaded.remarks),
            "saved": str(path),
        }
        if rank == 0:
            (folder / "facts.json").write_text(json.dumps(facts))


def _groups(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.groups == 1:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1]},
    ]


def _mean(loss: torch.Tensor, ranks: Ranks) -> float:
    mean = loss.detach().float().clone()
    if ranks.world_size > 1:
        dist.all_reduce(mean)
    assert BATCH % ranks.world_size == 0
    return float(mean / ranks.world_size)
