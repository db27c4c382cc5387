"""Reading DCP folders of sharded safetensors, those of this package or of torch's own writer."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from core.checkpoints.boxes import StoredTensor, fill
from core.disk import plain_name
from core.errors import CheckpointError
from core_fastpersist.dcp.shards import OBJECTS, SHARDING
from core_fastpersist.files.header import READABLE
from core_fastpersist.files.parsing import read_header
from core_fastpersist.storage import DirectSource

_NONSENSE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""What made-up metadata can lead to."""


@dataclass(frozen=True)
class _Stored:
    """Where a chunk lies: file, first byte, dtype, shape."""

    file: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsReader(StorageReader):
    """Reads a folder of sharded safetensors past the page cache, held against digests it may have.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._source = DirectSource(self.path)
        self._chunks: dict[tuple[str, tuple[int, ...]], _Stored] = {}
        self._objects: dict[str, tuple[str, int, int]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id:
            self.path = Path(checkpoint_id)
            self._source = DirectSource(self.path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        paths = sorted(self.path.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.path} has no safetensors file")
        for path in paths:
            self._read_header(path, found)
        self._require_whole(found)
        found |= {name: BytesStorageMetadata() for name in self._objects}
        return Metadata(found, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if not self._chunks:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                file, offset, length = self._objects[name]
                if min(offset, length) < 0 or offset + length > self._source.size(file):
                    raise CheckpointError(
                        f"{self.path / file} is truncated, or what leads to {name!r} is damaged",
                        why=f"{length:,} bytes from {offset:,} on are not there",
                    )
                blob = bytearray(length)
                self._source.read_into(file, offset, blob)
                planner.load_bytes(item, io.BytesIO(blob))
                continue
            chunk = self._chunks[name, tuple(item.storage_index.offset or ())]
            target = planner.resolve_tensor(item).detach()
            stored = StoredTensor(chunk.file, chunk.begin, chunk.dtype, chunk.shape)
            fill(target, self._source, stored, item.storage_offsets)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return Path(checkpoint_id).is_dir()

    def _read_header(
        self, path: Path, found: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    ) -> None:
        header = read_header(path)
        try:
            sharding = json.loads(header.metadata.get(SHARDING, "{}"))
            objects = json.loads(header.metadata.get(OBJECTS, "{}"))
            for name, (file, offset, length) in objects.items():
                self._objects[name] = plain_name(file), int(offset), int(length)
            for entry in header.entries:
                told = sharding.get(entry.name, {}).get("saved_offsets", [0] * len(entry.shape))
                offsets = tuple(int(offset) for offset in told)
                if len(offsets) != len(entry.shape) or min(offsets, default=0) < 0:
                    raise ValueError(f"{entry.name!r} of {entry.shape} lies at {offsets}")
                dtype = READABLE[entry.dtype]
                place = _Stored(path.name, header.start + entry.begin, dtype, entry.shape)
                self._chunks[entry.name, offsets] = place
                _add_chunk(found, entry.name, place, offsets)
        except _NONSENSE as error:
            raise CheckpointError(f"{path} is damaged", why=str(error)) from None

    def _require_whole(
        self, found: Mapping[str, TensorStorageMetadata | BytesStorageMetadata]
    ) -> None:
        """DCP does not see that a file is missing from between others, and leaves its rows alone."""
        there: Counter[str] = Counter()
        for (name, _), chunk in self._chunks.items():
            there[name] += math.prod(chunk.shape)
        for name, known in found.items():
            if isinstance(known, TensorStorageMetadata) and there[name] < known.size.numel():
                raise CheckpointError(
                    f"{self.path} has only parts of {name!r}",
                    why=f"{there[name]:,} of {known.size.numel():,} elements are there",
                    fix="use an older checkpoint",
                )


def _add_chunk(
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata],
    name: str,
    stored: _Stored,
    offsets: tuple[int, ...],
) -> None:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(stored.shape))
    ends = [offset + size for offset, size in zip(offsets, stored.shape, strict=True)]
    known = found.get(name)
    if not isinstance(known, TensorStorageMetadata):
        properties = TensorProperties(dtype=stored.dtype)
        found[name] = TensorStorageMetadata(properties, torch.Size(ends), [chunk])
        return
    if len(known.size) != len(ends) or known.properties.dtype != stored.dtype:
        raise ValueError(f"the parts of {name!r} do not fit together")
    known.chunks.append(chunk)
    known.size = torch.Size(max(pair) for pair in zip(known.size, ends, strict=True))
