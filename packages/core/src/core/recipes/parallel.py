"""Data parallelism of the training recipe: DDP or FSDP2 over the run's mesh."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from core.run import Run


def parallelize(model: nn.Module, run: Run, how: str) -> nn.Module:
    """Spread a model over the ranks of ``run``; a single process keeps it as it is.

    Args:
        model: on the run's device.
        run: gives the ranks; those that share a sequence share parameters like all others.
        how: ``ddp``, or ``fsdp2`` and ``auto`` for sharded parameters.
    """
    mesh = run.ranks.flat_mesh
    if mesh is None:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: those transformers names as not to be split."""
    names: Collection[str] = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


@contextmanager
def gradient_sync(model: nn.Module, wanted: bool) -> Generator[None]:
    """Exchange gradients only in the last backward pass of an optimizer step."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    yield


def mean_over_ranks(value: Tensor, run: Run) -> float:
    """Average a scalar over all ranks."""
    if run.world_size > 1:
        import torch.distributed as dist

        value = value.detach().clone()
        dist.all_reduce(value)
        value /= run.world_size
    return float(value)


def clip(model: nn.Module, norm: float) -> float:
    """Clip the gradient to ``norm`` (0 leaves it) and return its norm before that."""
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), norm or float("inf"))
    return float(found.full_tensor() if isinstance(found, DTensor) else found)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP; FSDP2 changes models in place."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner
