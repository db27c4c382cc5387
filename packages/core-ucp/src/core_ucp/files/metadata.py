"""DCP's ``.metadata``, with what Megatron-core adds to it; no other class comes to life."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.metadata import Metadata

from core.checkpoints.dcp import (
    _MetadataUnpickler,  # pyright: ignore[reportPrivateUsage] # its list of classes is the base
)
from core.disk import disk_errors
from core.errors import CheckpointError

METADATA = ".metadata"
_LARGEST = 2**31
_PLANS = {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
"""Data classes of DCP's plans, which Megatron-core keeps to save faster the next time."""
_MEGATRON = {"MCoreMetadata": Metadata, "MCoreSavePlan": planner.SavePlan}
"""Subclasses that Megatron-core 0.15 writes, and what they derive from."""


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata``.

    Raises:
        CheckpointError: when it is damaged, or wants to run code, naming what.
    """
    path = folder / METADATA
    with disk_errors(f"cannot read {path}"):
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is no DCP metadata", why="it is too large")
        content = path.read_bytes()
    try:
        found: Any = _Unpickler(io.BytesIO(content)).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the parser
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} is damaged", why="it holds no DCP metadata")
    return found


class _Unpickler(_MetadataUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.planner" and name in _PLANS:
            return getattr(planner, name)
        if module.startswith("megatron.core.dist_checkpointing.") and name in _MEGATRON:
            return _MEGATRON[name]
        return super().find_class(module, name)
