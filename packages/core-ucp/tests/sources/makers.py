"""Makes real checkpoints with the programs that write them, and the truth beside each.

Called as ``python makers.py FOLDER CASE...``: every case becomes ``FOLDER/CASE/checkpoint`` with
``FOLDER/CASE/truth.pt``, the whole tensors by the keys that a view must give them. Called as
``python makers.py load CHECKPOINT...`` it loads DCP folders with stock ``dcp.load`` into a model and
an optimizer on three FSDP2 ranks, and keeps what is in them then beside each folder, in ``.pt``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

warnings.simplefilter("ignore")


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    """Sizes that ranks do not divide, unless asked, and a buffer."""

    def __init__(self, width: int = 7, inner: int = 10) -> None:
        super().__init__()
        self.first = Block(width, inner)
        self.second = Block(width, inner)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.scale.sum()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> None:
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def truth(model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": whole(tensor) for name, tensor in model.items()}
    for name, states in optimizer["state"].items():
        found |= {f"optim.state.{name}.{state}": whole(t) for state, t in states.items()}
    return found


def trained(model: nn.Module, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    optimizer = optimizer_of(model)
    train(model, optimizer, width)
    return get_state_dict(model, optimizer)


def keep(folder: Path, found: dict[str, torch.Tensor]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / "truth.pt")


def plain(folder: Path) -> None:
    """One process, the parts inside of an application's own object."""
    model, optimizer = trained(Net(), 7)
    state = {
        "app": {"model": model, "optim": optimizer},
        "turned": torch.arange(12.0).reshape(3, 4).t(),
        "epoch": 4,
        "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.01, 0.02]},
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(model, optimizer) | {"extra.turned": state["turned"]})


def flattened(folder: Path) -> None:
    """The flattened form of the optimizer's state, at the top level."""
    model = Net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    nested = get_state_dict(model, optimizer)
    names, flat = get_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    dcp.save({"net": names, "adam": flat}, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(*nested))


def numbered(folder: Path) -> None:
    """Ranks with the whole model each, and an optimizer's own state, which numbers parameters."""
    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(*get_state_dict(model, optimizer)))


def fsdp2(folder: Path) -> None:
    """Uneven shards; the last ranks hold nothing of the small ones."""
    torch.manual_seed(0)
    model = Net()
    for block in (model.first, model.second):
        fully_shard(block)
    fully_shard(model)
    found, optimizer = trained(model, 7)
    dcp.save({"model": found, "optim": optimizer}, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(found, optimizer))


def hsdp(folder: Path) -> None:
    """Shards that two groups of ranks hold alike."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = Net()
    fully_shard(model, mesh=mesh)
    found, optimizer = trained(model, 7)
    dcp.save({"model": found, "optim": optimizer}, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(found, optimizer))


def tensor_parallel(folder: Path) -> None:
    """FSDP2 over tensor parallelism, both on rows: strided shards."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Net(width=8, inner=12)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in (model.first, model.second):
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    found, optimizer = trained(model, 8)
    dcp.save({"model": found, "optim": optimizer}, checkpoint_id=folder / "checkpoint")
    keep(folder, truth(found, optimizer))


def safetensors_shards(folder: Path) -> None:
    """DCP's Hugging Face writer: every rank its own file of parts."""
    torch.manual_seed(0)
    model = Net()
    fully_shard(model)
    found, optimizer = trained(model, 7)
    flat = {f"model.{name}": tensor for name, tensor in found.items()}
    for name, states in optimizer["state"].items():
        flat |= {f"optim.state.{name}.{state}": tensor for state, tensor in states.items()}
    path = str(folder / "checkpoint")
    dcp.save(flat, storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))
    keep(folder, truth(found, optimizer))


def rank_files(folder: Path) -> None:
    """One pickle of DTensors for each rank, as trainers for reinforcement learning save them."""
    torch.manual_seed(0)
    model = Net()
    fully_shard(model)
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    found, states = get_state_dict(model, optimizer)
    path = folder / "checkpoint"
    path.mkdir(exist_ok=True)
    end = f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(found, path / f"model_{end}")
    torch.save(states, path / f"optim_{end}")
    rest = {"lr_scheduler": {"last_epoch": 3}, "rng": {"cpu": torch.get_rng_state()}}
    torch.save(rest, path / f"extra_state_{end}")
    keep(folder, truth(found, states))


def parallel_rank_files(folder: Path) -> None:
    """The same of two mesh dimensions that cut the same rows."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Net(width=8, inner=12)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in (model.first, model.second):
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    found, states = trained(model, 8)
    path = folder / "checkpoint"
    path.mkdir(exist_ok=True)
    end = f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(found, path / f"model_{end}")
    torch.save(states, path / f"optim_{end}")
    keep(folder, truth(found, states))


def accelerated(folder: Path) -> None:
    """What ``Accelerator.save_state`` leaves, in both of its formats for weights."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = Net()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, scheduler)
    train(prepared[0], prepared[1], 7)
    prepared[2].step()
    accelerator.save_state(str(folder / "checkpoint"), safe_serialization=False)
    accelerator.save_state(str(folder / "safetensors"))
    keep(folder, truth(*get_state_dict(model, optimizer)))


def accelerated_fsdp2(folder: Path) -> None:
    """What accelerate's own functions leave of an FSDP2 model; its launcher wants GPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    torch.manual_seed(0)
    model = Net()
    fully_shard(model)
    optimizer = optimizer_of(model)
    train(model, optimizer, 7)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    process = SimpleNamespace(num_processes=dist.get_world_size(), process_index=dist.get_rank())
    path = str(folder / "checkpoint")
    save_fsdp_model(plugin, process, model, path)
    save_fsdp_optimizer(plugin, process, optimizer, model, path)
    keep(folder, truth(*get_state_dict(model, optimizer)))


CASES: dict[str, tuple[int, Callable[[Path], None]]] = {
    "plain": (1, plain),
    "flattened": (1, flattened),
    "numbered": (2, numbered),
    "fsdp2": (3, fsdp2),
    "hsdp": (4, hsdp),
    "tensor_parallel": (4, tensor_parallel),
    "safetensors_shards": (3, safetensors_shards),
    "rank_files": (3, rank_files),
    "parallel_rank_files": (4, parallel_rank_files),
    "accelerated": (1, accelerated),
    "accelerated_fsdp2": (2, accelerated_fsdp2),
}


def on_ranks(count: int, make: Callable[[Path], None], folder: Path) -> None:
    """Run a maker on forked processes; the parent has imported everything once."""
    fork = multiprocessing.get_context("fork")
    meeting = folder.absolute().with_name(f"{folder.name}.meeting")
    ranks = [
        fork.Process(target=_rank, args=(r, count, meeting, make, folder)) for r in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    if any(rank.exitcode != 0 for rank in ranks):
        sys.exit(f"{make.__name__}: ranks ended with {[rank.exitcode for rank in ranks]}")


def _rank(rank: int, count: int, meeting: Path, make: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    # A file, because a port that is free now may be taken before the ranks meet there.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    make(folder)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


def load(folder: Path) -> None:
    """Load a DCP folder into a fresh model and optimizer."""
    torch.manual_seed(1)
    model = Net()
    for block in (model.first, model.second):
        fully_shard(block)
    fully_shard(model)
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    found, states = get_state_dict(model, optimizer)
    dcp.load(state := {"model": found, "optim": states}, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    loaded = truth(*get_state_dict(model, optimizer))
    loaded["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    if dist.get_rank() == 0:
        torch.save(loaded, folder.with_suffix(".pt"))


def main() -> None:
    """Make the cases that are asked for, or load folders."""
    torch.set_num_threads(1)
    root, *names = sys.argv[1:]
    if root == "load":
        for name in names:
            on_ranks(3, load, Path(name))
        return
    for name in names:
        folder = Path(root) / name
        folder.mkdir(parents=True)
        count, make = CASES[name]
        if count == 1:
            make(folder)
        else:
            on_ranks(count, make, folder)


if __name__ == "__main__":
    main()
