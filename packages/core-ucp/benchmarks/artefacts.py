"""Checkpoints to convert: a stack of linear layers trained one step by DeepSpeed, or by FSDP2."""

from __future__ import annotations

import argparse
import os
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LAYERS = 8


def make(kind: str, width: int, world: int, folder: Path) -> None:
    """Train one step on several CPU ranks and save.

    Args:
        kind: ``zero1``, ``zero3`` or ``dcp``.
        width: of the layers; there are eight of ``width * width`` weights, each with a bias.
        world: number of ranks.
        folder: that is created.
    """
    # Imported before the ranks are forked, which would all spend half a minute on it.
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    if kind != "dcp":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    work = (kind, width, world, folder, port)
    ranks = [context.Process(target=_rank, args=(rank, *work)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"a rank of {kind} failed")


def _rank(rank: int, kind: str, width: int, world: int, folder: Path, port: int) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
    (_fsdp2 if kind == "dcp" else _deepspeed)(model, kind, width, folder)


def _deepspeed(model: Any, kind: str, width: int, folder: Path) -> None:
    import deepspeed
    import torch

    model.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": int(kind[-1])},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings, dist_init_required=True
    )
    loss = engine(torch.ones(1, width, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag="global_step1")


def _fsdp2(model: Any, kind: str, width: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, width)).square().mean().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("zero1", "zero3", "dcp"))
    parser.add_argument("width", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("folder", type=Path)
    make(**vars(parser.parse_args()))
