"""The safetensors format: one file of whole tensors that every other tool reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from core.checkpoints.boxes import StoredTensor, fill, memory
from core.errors import CheckpointError
from core.storage import ByteSink, ByteSource, FileSource

if TYPE_CHECKING:
    from core.run import Run

FILE = "model.safetensors"
_LARGEST_HEADER = 100_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names that the format gives to dtypes."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape, and the byte range of its elements in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def reader(path: Path, run: Run) -> SafetensorsReader:
    """Open a safetensors file, or a folder of them."""
    return SafetensorsReader(path, run.checkpoints.storage(path).value.source(path))


def writer(path: Path, run: Run) -> SafetensorsWriter:
    """Write one safetensors file into a folder."""
    if run.world_size > 1:
        raise CheckpointError(
            "safetensors files hold whole tensors, and this run has several ranks",
            fix="save as dcp and use `core convert`",
        )
    return SafetensorsWriter(path, run.checkpoints.storage(path).value.sink(path))


class SafetensorsReader(StorageReader):
    """DCP reader of safetensors; each tensor is one chunk, read straight into its target."""

    def __init__(self, path: Path, source: ByteSource | None = None) -> None:
        self.path = path
        self._source = source or FileSource(path)
        self._entries: dict[str, Entry] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        self._entries = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._entries = read_entries(self.path, self._source)
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        found |= {name: _describe(entry) for name, entry in self._entries.items()}
        return Metadata(state_dict_metadata=found, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if not self._entries:
            self._entries = read_entries(self.path, self._source)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            entry = self._entries[item.storage_index.fqn]
            target = planner.resolve_tensor(item).detach()
            stored = StoredTensor(entry.file, entry.begin, entry.dtype, entry.shape)
            fill(target, self._source, stored, item.storage_offsets)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return Path(checkpoint_id).exists()


def read_entries(path: Path, source: ByteSource) -> dict[str, Entry]:
    """Read and check the headers of a safetensors file, or of all such files in a folder.

    Raises:
        CheckpointError: for no file, or a header that is damaged, hostile, or does not fit the
            file's size.
    """
    files = [path.name] if path.is_file() else sorted(p.name for p in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no safetensors file")
    entries: dict[str, Entry] = {}
    for name in files:
        for key, entry in read_header(name, source)[0].items():
            if key in entries:
                raise CheckpointError(f"{path} has {key!r} in {entries[key].file} and {name}")
            entries[key] = entry
    return entries


def read_header(name: str, source: ByteSource) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check the header of one file.

    Returns:
        the tensors by name, and the free text of the header.

    Raises:
        CheckpointError: for a header that is damaged, hostile, or does not fit the file's size.
    """
    size = source.size(name)
    length = bytearray(8)
    source.read_into(name, 0, length)
    count = int.from_bytes(length, "little")
    if count > min(_LARGEST_HEADER, size - 8):
        raise CheckpointError(f"{name} is damaged", why=f"its header claims {count:,} bytes")
    text = bytearray(count)
    source.read_into(name, 8, text)
    try:
        header = json.loads(text)
        free = header.pop("__metadata__", {}).items()
        entries = {key: _entry(name, 8 + count, value) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged header", why=str(error)) from None
    end = 8 + count
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != end:
            raise CheckpointError(f"{name} is damaged", why=f"hole or overlap before {key!r}")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{name} is {size:,} bytes long", why=f"its header says {end:,}")
    return entries, {str(key): str(value) for key, value in free}


def _entry(file: str, start: int, value: Mapping[str, Any]) -> Entry:
    dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
    begin, end = (start + int(offset) for offset in value["data_offsets"])
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{value} does not add up")
    return Entry(file, dtype, shape, begin, end)


def _describe(entry: Entry) -> TensorStorageMetadata:
    size = torch.Size(entry.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), size, [chunk])


class SafetensorsWriter(StorageWriter):
    """DCP writer of one safetensors file, one tensor in memory at a time; for one process."""

    def __init__(self, path: Path, sink: ByteSink) -> None:
        self.path = path
        self._sink = sink

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = sorted(plan.items, key=_widest_first)
        try:
            entries, header = _lay_out(items)
            end = max((e.end for e in entries.values()), default=len(header))
            self._sink.open(FILE, end)
            self._sink.write_at(FILE, 0, header)
            for item in items:
                self._write(item, entries[item.index.fqn].begin, planner)
            self._sink.commit()
        except BaseException:
            self._sink.abort()
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(i.index, _bytes(i), None) for i in items])
        return done

    def _write(self, item: WriteItem, offset: int, planner: SavePlanner) -> None:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        self._sink.write_at(FILE, offset, memory(tensor.detach().cpu().contiguous()))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return not Path(checkpoint_id).exists()


def _lay_out(items: Sequence[WriteItem]) -> tuple[dict[str, Entry], bytes]:
    """Byte ranges in the order of ``items``, and the header that describes them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends, position = {}, 0
    for item in items:
        name, dtype, shape = item.index.fqn, *_whole_tensor(item)
        ends[name] = (dtype, shape, position, position + _bytes(item))
        position += _bytes(item)
        offsets = [ends[name][2], ends[name][3]]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {n: Entry(FILE, d, s, start + b, start + e) for n, (d, s, b, e) in ends.items()}
    return entries, len(text).to_bytes(8, "little") + text


def _whole_tensor(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    name = item.index.fqn
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        raise CheckpointError(f"safetensors cannot hold {name!r}", why="it is no tensor")
    if name == "__metadata__":
        raise CheckpointError("safetensors cannot hold a tensor called '__metadata__'")
    dtype, size = item.tensor_data.properties.dtype, item.tensor_data.size
    if dtype not in _NAMES:
        raise CheckpointError(f"safetensors cannot hold {name!r}", why=f"it is {dtype}")
    if item.tensor_data.chunk.sizes != size:
        raise CheckpointError(
            f"safetensors holds whole tensors, and {name!r} is sharded",
            fix="save as dcp and use `core convert`",
        )
    return dtype, tuple(size)


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.size) * data.properties.dtype.itemsize


def _widest_first(item: WriteItem) -> tuple[int, str]:
    data = item.tensor_data
    return (0 if data is None else -data.properties.dtype.itemsize, item.index.fqn)
