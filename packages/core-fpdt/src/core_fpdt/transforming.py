"""Chunks in a run: the transform of its model, and that of its batches."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from core_fpdt.enabling import enable, resolved
from core_fpdt.parallel.mesh import peers_of
from core_fpdt.parallel.sharding import shard
from core_fpdt.settings import FPDTSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from core.run import Run


def run_in_chunks(model: nn.Module, run: Run) -> nn.Module:
    """Let the layers of a run's model run in chunks, as the settings say.

    Raises:
        ModelError: for a model that cannot.
    """
    settings = run.settings(FPDTSettings)
    enabled = enable(model, settings, group=_shared_mesh(run, settings))
    tokens = enabled.settings.chunk_tokens
    run.announce(f"fpdt: {type(model).__name__} runs in chunks of {tokens} tokens")
    return model


def share(batch: MutableMapping[str, Tensor], run: Run) -> MutableMapping[str, Tensor]:
    """Cut a batch for this rank, where ranks share sequences.

    Raises:
        DataError: on all ranks, when their batches differ.
    """
    settings = run.settings(FPDTSettings)
    mesh = _shared_mesh(run, settings)
    if mesh is None:
        return batch
    chunk = resolved(settings, run.device).chunk_tokens
    return shard(batch, chunk, peers_of(mesh, settings.mesh_dim))


def _shared_mesh(run: Run, settings: FPDTSettings) -> DeviceMesh | None:
    """The run's mesh, if one of its dimensions is of ranks that share sequences."""
    names = (run.mesh.mesh_dim_names if run.mesh is not None else None) or ()
    return run.mesh if settings.mesh_dim in names else None
