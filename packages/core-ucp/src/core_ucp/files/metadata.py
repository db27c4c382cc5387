"""DCP's ``.metadata``, with what Megatron-core adds to it; no other class comes to life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.metadata import Metadata

from core.checkpoints.metadata import METADATA as METADATA, MetadataUnpickler, read_metadata as read

_PLANS = {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
"""Data classes of DCP's plans, which Megatron-core keeps to save faster the next time."""
_MEGATRON = {"MCoreMetadata": Metadata, "MCoreSavePlan": planner.SavePlan}
"""Subclasses that Megatron-core 0.15 writes, and what they derive from."""


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata``.

    Raises:
        CheckpointError: when it is damaged, or wants to run code, naming what.
    """
    return read(folder, _Unpickler)


class _Unpickler(MetadataUnpickler):
    def allowed(self, module: str, name: str) -> Any:
        if module == planner.__name__ and name in _PLANS:
            return getattr(planner, name)
        if module.startswith("megatron.core.dist_checkpointing.") and name in _MEGATRON:
            return _MEGATRON[name]
        return super().allowed(module, name)
