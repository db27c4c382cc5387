"""Loading any checkpoint straight into a model on any number of ranks, without converting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from core.checkpoints.boxes import memory
from core.errors import CheckpointError
from core_ucp.execution.digest import digest_of
from core_ucp.execution.gathering import item_type, read_box, scaled
from core_ucp.view.keys import parse_key, weight_key
from core_ucp.view.view import Atom, View


class UniversalReader(StorageReader):
    """A DCP reader of whatever checkpoint a view was made of.

    Every rank reads the bytes of its own shards and no others. Tensors have the keys of DCP's
    flattened state dicts: ``model.<parameter>`` and ``optim.state.<parameter>.<state>``. One that is
    read as a whole is held against the digest that the checkpoint has of it.

    Example::

        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(...)}
        dcp.load(state, storage_reader=UniversalReader("global_step100"))

    Args:
        checkpoint: a path, whose format is found by looking, or an open view.

    Attributes:
        view: what is read.
        bytes_read: bytes of tensors read from files so far.

    Raises:
        CheckpointError: when the checkpoint is damaged, incomplete, or of no known format.
    """

    def __init__(self, checkpoint: str | Path | View) -> None:
        super().__init__()
        if not isinstance(checkpoint, View):
            from core_ucp.sources.registry import open_checkpoint

            checkpoint = open_checkpoint(Path(checkpoint))
        self.view: View = checkpoint
        self.bytes_read = 0
        self._atoms = _with_aliases(self.view)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.view.prove()
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        found |= {key: _describe(atom) for key, atom in self._atoms.items()}
        return Metadata(found, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._fill(item.storage_index.fqn, tuple(item.storage_offsets), target)
            planner.commit_tensor(item, target)
        self.view.files.require_unchanged()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, key: str, start: tuple[int, ...], target: torch.Tensor) -> None:
        atom = self._atoms.get(key)
        if atom is None:
            raise CheckpointError(f"{self.view.path} has no {key}")
        direct = (
            target.device.type == "cpu"
            and target.dtype == atom.dtype
            and target.is_contiguous()
            and atom.exact
        )
        read = target if direct else torch.empty(target.shape, dtype=atom.stored)
        if read.numel():
            items = np.ndarray(tuple(read.shape), item_type(atom.stored.itemsize), memory(read))
            self.bytes_read += read_box(self.view.files, atom, start, items)
            if tuple(read.shape) == atom.shape:
                self._require_as_saved(key, read)
        if not direct:
            target.copy_(scaled(key, read, atom.exponent).to(atom.dtype))

    def _require_as_saved(self, key: str, read: torch.Tensor) -> None:
        part = parse_key(key)
        owner = self.view.aliases.get(part.parameter) if part and not part.state else None
        saved = self.view.digests.get(weight_key(owner) if owner else key)
        if saved is not None and saved != str(found := digest_of(memory(read))):
            raise CheckpointError(
                f"{key} of {self.view.path} is not what was saved",
                why=f"its digest is {found}, not {saved}",
                fix="use another copy of the checkpoint",
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return Path(checkpoint_id).exists()


def _with_aliases(view: View) -> dict[str, Atom]:
    tied = {
        weight_key(alias): view.atoms[weight_key(owner)] for alias, owner in view.aliases.items()
    }
    return {**tied, **view.atoms}


def _describe(atom: Atom) -> TensorStorageMetadata:
    size = torch.Size(atom.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=atom.dtype), size, [chunk])
