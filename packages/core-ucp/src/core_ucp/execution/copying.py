"""Carrying a plan out: block by block, in a few threads, through core's byte sink."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import CheckpointError
from core.storage import ByteSink, FileSink
from core_ucp.execution.checking import require_equal_copies
from core_ucp.execution.digest import Digest, digest_of
from core_ucp.execution.gathering import Items, item_type, read_pieces, scaled
from core_ucp.execution.planning import BLOCK, Copies, Plan
from core_ucp.view.boxes import Table
from core_ucp.view.pieces import row_major
from core_ucp.view.view import Atom

Progress = Callable[[int], None]
"""Called with a number of bytes whenever that many more are written; from any thread."""
OpenSink = Callable[[Path], ByteSink]


def execute(
    plan: Plan,
    folder: Path,
    *,
    open_sink: OpenSink = FileSink,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Digest]:
    """Make the target in an empty folder; the source is only read.

    Where the source has several copies of a tensor, they are held against each other.
    Memory is bounded: each worker holds one block of ``BLOCK`` bytes, and what it is cast to.

    Args:
        plan: from :func:`core_ucp.execution.planning.plan`.
        folder: empty, and made visible by whoever handed it out (:func:`core.storage.new_folder`).
        open_sink: what carries the bytes into a folder.
        progress: is told of every written block.
        workers: threads; two unless given, one on a single processor.

    Returns:
        digests, by key, of the atoms that were written as a whole.

    Raises:
        CheckpointError: when reading or writing fails, copies differ, or the source was changed
            meanwhile.
    """
    sinks = _Sinks(folder, open_sink)
    digests = _Digests(c.wanted.key for c in plan.copies if c.digested)
    try:
        for file in plan.target.files:
            sinks.open(file.name, file.size)
            for offset, data in file.parts:
                sinks.write(file.name, offset, data)
        job = _Job(plan, sinks, digests, progress)
        _in_threads(job.do, _batches(plan), workers or min(2, os.cpu_count() or 1))
        plan.view.files.require_unchanged()
        _require_as_saved(plan, digests.found)
        for key in dict.fromkeys(copies.wanted.key for copies in plan.copies):
            require_equal_copies(plan.view, key, plan.view.atoms[key])
        sinks.commit()
    except BaseException:
        sinks.abort()
        raise
    plan.target.finish(folder, {key: str(value) for key, value in digests.found.items()})
    return digests.found


def _require_as_saved(plan: Plan, found: Mapping[str, Digest]) -> None:
    """Hold what was read against the digests that the source has of itself."""
    for copies in plan.copies:
        key, source = copies.wanted.key, copies.source
        exact = source.exact and copies.wanted.atom.dtype == source.dtype
        saved = plan.view.digests.get(key) if copies.digested and exact else None
        if saved is not None and saved != str(found[key]):
            names = sorted({plan.view.files.names[file] for file in source.pieces.file.tolist()})
            raise CheckpointError(
                f"{key} is not what was saved",
                why=f"its digest is {found[key]}, not {saved}; it lies in {', '.join(names)}",
                fix="use another copy of the checkpoint",
            )


@dataclass(frozen=True)
class _Block:
    copies: Copies
    row: int
    offset: int
    nbytes: int
    dense: bool


@dataclass
class _Batch:
    """Blocks that lie side by side in a new file and are written together."""

    file: int
    offset: int
    blocks: list[_Block] = field(default_factory=list)
    nbytes: int = 0


def _batches(plan: Plan) -> Iterator[_Batch]:
    """All blocks in the order of the new files, those that touch in batches of ``BLOCK`` bytes."""
    found = sorted(_rows(plan), key=lambda row: row[:2])
    current: _Batch | None = None
    for file, offset, block in found:
        fits = (
            current is not None
            and current.file == file
            and current.offset + current.nbytes == offset
            and current.nbytes + block.nbytes <= BLOCK
            and block.dense
            and current.blocks[-1].dense
        )
        if current is None or not fits:
            if current is not None:
                yield current
            current = _Batch(file, offset)
        current.blocks.append(block)
        current.nbytes += block.nbytes
    if current is not None:
        yield current


def _rows(plan: Plan) -> Iterator[tuple[int, int, _Block]]:
    for copies in plan.copies:
        blocks = copies.blocks
        lengths = (blocks.boxes.volume * copies.wanted.atom.dtype.itemsize).tolist()
        places = zip(blocks.file.tolist(), blocks.offset.tolist(), strict=True)
        for row, (file, offset) in enumerate(places):
            yield file, offset, _Block(copies, row, offset, lengths[row], bool(copies.dense[row]))


class _Sinks:
    """A sink for every folder that files are made in."""

    def __init__(self, folder: Path, open_sink: OpenSink) -> None:
        self._folder = folder
        self._open_sink = open_sink
        self._sinks: dict[PurePosixPath, ByteSink] = {}
        # File systems let one thread at a time write into a file, and the others wait by turning
        # round and round: with a lock of our own they sleep, or read what comes next.
        self._turns: dict[str, threading.Lock] = {}

    def open(self, name: str, size: int) -> None:
        path = PurePosixPath(name)
        if path.parent not in self._sinks:
            self._sinks[path.parent] = self._open_sink(self._folder / path.parent)
        self._sinks[path.parent].open(path.name, size)
        self._turns[name] = threading.Lock()

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        path = PurePosixPath(name)
        with self._turns[name]:
            self._sinks[path.parent].write_at(path.name, offset, data)

    def commit(self) -> None:
        for sink in self._sinks.values():
            sink.commit()

    def abort(self) -> None:
        for sink in self._sinks.values():
            sink.abort()


class _Digests:
    def __init__(self, keys: Iterable[str]) -> None:
        self.found = dict.fromkeys(keys, Digest())
        self._lock = threading.Lock()

    def add(self, key: str, digest: Digest) -> None:
        with self._lock:
            self.found[key] += digest


class _Memory(threading.local):
    """Memory of each worker that is used again and again: fresh pages cost as much as a copy."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def octets(self, purpose: str, count: int) -> NDArray[np.uint8]:
        """Uninitialised bytes that are valid until the same purpose asks again."""
        kept = self._kept.get(purpose)
        if kept is None or len(kept) < count:
            kept = self._kept[purpose] = np.empty(max(count, BLOCK), np.uint8)
        return kept[:count]


@dataclass
class _Job:
    plan: Plan
    sinks: _Sinks
    digests: _Digests
    progress: Progress | None
    memory: _Memory = field(default_factory=_Memory)

    def do(self, batch: _Batch) -> None:
        name = self.plan.target.files[batch.file].name
        if len(batch.blocks) == 1 and not batch.blocks[0].dense:
            self._scatter(name, batch.blocks[0])
        else:
            buffer = self.memory.octets("new", batch.nbytes)
            for block in batch.blocks:
                place = block.offset - batch.offset
                self._fill(block, buffer[place : place + block.nbytes])
            self.sinks.write(name, batch.offset, buffer.data)
        if self.progress is not None:
            self.progress(batch.nbytes)

    def _scatter(self, name: str, block: _Block) -> None:
        """Write a block whose elements lie apart, run by run."""
        buffer = self.memory.octets("new", block.nbytes)
        self._fill(block, buffer)
        atom, blocks = block.copies.wanted.atom, block.copies.blocks
        shape, stride = blocks.boxes.size[block.row].tolist(), blocks.stride[block.row].tolist()
        items = buffer.view(item_type(atom.dtype.itemsize)).reshape(shape)
        # The dimension with the smallest step goes last: it is a run where it has no gaps.
        order = sorted(range(len(shape)), key=lambda d: -stride[d])
        items = items.transpose(order)
        steps = [stride[d] for d in order]
        run = steps[-1] == atom.dtype.itemsize
        outer = items.shape[:-1] if run else items.shape
        for index in itertools.product(*map(range, outer)):
            moved = sum(i * s for i, s in zip(index, steps, strict=False))
            data = np.ascontiguousarray(items[index]).reshape(-1).view(np.uint8)
            self.sinks.write(name, block.offset + moved, data.data)

    def _fill(self, block: _Block, into: NDArray[np.uint8]) -> None:
        """Read a block, in the wanted dtype and row-major order, and note its digest."""
        copies, row = block.copies, block.row
        wanted, source = copies.wanted.atom, copies.source
        start, shape = copies.blocks.boxes.start[row], copies.blocks.boxes.size[row].tolist()
        parts = copies.parts.take(_slice(copies.first, row))
        files, corner = self.plan.view.files, start.tolist()
        if source.exact and wanted.dtype == source.dtype:
            items: Items = _shaped(into, source.stored.itemsize, shape)
            read_pieces(files, parts, corner, items)
        else:
            size = source.stored.itemsize
            kept = self.memory.octets("raw", int(np.prod(shape, dtype=np.int64)) * size)
            raw = _shaped(kept, size, shape)
            read_pieces(files, parts, corner, raw)
            _convert(copies.wanted.key, raw, source, wanted, into)
        if copies.digested:
            self.digests.add(copies.wanted.key, _digest(into, wanted, start, shape))


def _slice(first: Table, row: int) -> Table:
    return np.arange(first[row], first[row + 1], dtype=np.int64)


def _shaped(octets: NDArray[np.uint8], itemsize: int, shape: list[int]) -> Items:
    kind = item_type(itemsize)
    return np.ndarray(tuple(shape), kind, octets.data) if octets.size else np.empty(shape, kind)


def _convert(key: str, raw: Items, source: Atom, wanted: Atom, into: NDArray[np.uint8]) -> None:
    """Round to the wanted dtype, to nearest even and straight from the source's."""
    values: Any = torch.from_numpy(raw.reshape(-1).view(np.uint8)).view(source.stored)
    values = scaled(key, values, source.exponent)
    into[...] = values.to(source.dtype).to(wanted.dtype).view(torch.uint8).numpy()


def _digest(octets: NDArray[np.uint8], atom: Atom, start: Table, shape: list[int]) -> Digest:
    """Digest of a block, run by run of elements that follow each other in the atom."""
    itemsize = atom.dtype.itemsize
    steps = row_major(atom.shape, itemsize)
    begin = int((start * np.array(steps, np.int64)).sum())
    dim = len(shape)
    while dim > 0 and (dim == len(shape) or shape[dim] == atom.shape[dim]):
        dim -= 1
    run = int(np.prod(shape[dim:], dtype=np.int64)) * itemsize
    total = Digest()
    for number, index in enumerate(itertools.product(*map(range, shape[:dim]))):
        moved = begin + sum(i * s for i, s in zip(index, steps, strict=False))
        total += digest_of(octets[number * run : (number + 1) * run], moved)
    return total


def _in_threads(do: Callable[[_Batch], None], batches: Iterator[_Batch], workers: int) -> None:
    """Do all batches; the first error stops the rest."""
    stop = threading.Event()
    lock = threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                batch = next(batches, None)
            if batch is None:
                return
            do(batch)

    with ThreadPoolExecutor(workers, thread_name_prefix="core-ucp") as pool:
        jobs = [pool.submit(work) for _ in range(workers)]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        except BaseException:
            stop.set()
            raise
