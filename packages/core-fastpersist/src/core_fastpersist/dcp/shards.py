"""DCP as safetensors: every rank writes its shards into files that any safetensors reader opens.

The layout is that of torch's ``HuggingFaceStorageWriter(save_distributed=True)``: each file tells in its
metadata where its tensors lie in the whole ones, and torch's ``HuggingFaceStorageReader`` reads them.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] # what DCP's writers give for a result
)
from torch.distributed.checkpoint.metadata import (
    Metadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core.checkpoints.safetensors import DTYPES
from core.disk import disk_errors, sync
from core.errors import CheckpointError
from core_fastpersist.coverage import write_digests
from core_fastpersist.dcp.staged import StagingWriter
from core_fastpersist.direct.newfile import NewFile
from core_fastpersist.direct.pieces import HostBytes, Piece
from core_fastpersist.files.header import Entry, draft
from core_fastpersist.tensors import source_of

SHARDING = "DCP_SHARDING_INFO"
OBJECTS = "fastpersist.objects"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter(StagingWriter):
    """Writes one safetensors file a rank, at the speed of the disk.

    Several chunks of one tensor on a rank go into several files, for a file has each name once.
    Objects that are no tensors go into a file of their own. A folder that has safetensors files is
    refused: their readers take all there are.

    Args:
        path: folder of the checkpoint.
        staging: how tensors are staged; shared by the checkpoints of a run.
    """

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        folder = Path(self.path)
        with disk_errors(f"cannot create {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder} has safetensors files already", fix="save into a new folder"
            )
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder = Path(self.path)
        rank = int(plan.storage_data.prefix.strip("_")) + 1
        results: list[WriteResult] = []
        try:
            objects, places = self._write_objects(folder, rank, plan.items, planner)
            results += objects
            files = _files(plan.items)
            for index, items in enumerate(files, start=1):
                name = f"shard-{rank:05d}-model-{index:05d}-of-{len(files):05d}.safetensors"
                told = places if index == 1 else {}
                results += self._write_tensors(folder / name, items, planner, told)
            with disk_errors(f"cannot make {folder} durable"):
                sync(folder)
        finally:
            self.release()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to write: every file describes itself."""

    def _write_tensors(
        self,
        path: Path,
        items: Sequence[WriteItem],
        planner: SavePlanner,
        objects: Mapping[str, Any],
    ) -> list[WriteResult]:
        entries: list[Entry] = []
        sharding: dict[str, Any] = {}
        end = 0
        for item in items:
            data, name = item.tensor_data, item.index.fqn
            assert data is not None
            shape, dtype = tuple(data.chunk.sizes), data.properties.dtype
            begin, end = end, end + data.chunk.sizes.numel() * dtype.itemsize
            entries.append(Entry(name, _NAMES[dtype], shape, begin, end))
            sharding[name] = {"saved_offsets": list(data.chunk.offsets)}
        extra = {SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0"}
        if objects:
            extra[OBJECTS] = json.dumps(objects)
        plan = draft(entries, None, chunk=self.staging.options.chunk, extra=extra)
        pieces = [
            Piece(plan.start + entry.begin, source_of(_resolve(item, planner), entry.name))
            for item, entry in zip(items, entries, strict=True)
        ]
        with NewFile(path, plan.size, self.staging.options) as file:
            digests = file.write(pieces, start=plan.start, keep_head=plan.start)
            file.sync()
            head = Piece(0, HostBytes(plan.block(digests)))
            file.write_head([head, *pieces], keep_head=plan.start)
            file.sync()
        return [
            WriteResult(
                item.index, entry.nbytes, _StorageInfo(path.name, entry.begin, entry.nbytes)
            )
            for item, entry in zip(items, entries, strict=True)
        ]

    def _write_objects(
        self, folder: Path, rank: int, items: Sequence[WriteItem], planner: SavePlanner
    ) -> tuple[list[WriteResult], dict[str, Any]]:
        """Write what is no tensor, as DCP has pickled it, one after the other."""
        name = f"shard-{rank:05d}-objects.bin"
        blob = bytearray()
        results: list[WriteResult] = []
        places: dict[str, Any] = {}
        for item in items:
            if item.type != WriteItemType.BYTE_IO:
                continue
            data = planner.resolve_data(item)
            assert isinstance(data, io.BytesIO)
            view = data.getbuffer()
            places[item.index.fqn] = [name, len(blob), view.nbytes]
            results.append(
                WriteResult(item.index, view.nbytes, _StorageInfo(name, len(blob), view.nbytes))
            )
            blob += view
        if places:
            with NewFile(folder / name, len(blob), self.staging.options) as file:
                digests = file.write([Piece(0, HostBytes(blob))])
                file.sync()
            write_digests(folder / name, digests)
        return results, places


def _files(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Distribute tensors over files such that each name is in a file once; at least one file."""
    files: list[list[WriteItem]] = [[]]
    seen: defaultdict[str, int] = defaultdict(int)
    tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
    for item in sorted(tensors, key=_widest_first):
        number = seen[item.index.fqn]
        seen[item.index.fqn] += 1
        if number == len(files):
            files.append([])
        files[number].append(item)
    return files


def _widest_first(item: WriteItem) -> tuple[int, str]:
    """Order by element size, so that every tensor is aligned to its elements; refuse what has no name."""
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    if dtype not in _NAMES or item.index.fqn == "__metadata__":
        raise CheckpointError(
            f"safetensors cannot hold {item.index.fqn!r}",
            why=f"it is {dtype}" if dtype not in _NAMES else "the format keeps the name for itself",
            fix="save it in DCP's native format",
        )
    return -dtype.itemsize, item.index.fqn


def _resolve(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor)
    return data
