"""Core's byte sink and source over direct I/O: what converters and other formats write and read with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from core.disk import disk_errors, plain_name, sync
from core.errors import CheckpointError
from core.storage import Buffer
from core_fastpersist.coverage import digests_of
from core_fastpersist.direct.digests import Digests, cells
from core_fastpersist.direct.memory import pages
from core_fastpersist.direct.newfile import NewFile, WriteOptions
from core_fastpersist.direct.pieces import HostBytes, Piece
from core_fastpersist.direct.reading import DirectFile, in_parallel, require_digest, require_size

_CHUNK = 16 * 2**20
_AHEAD = 2
_KEPT = 6


class DirectSink:
    """Files of one rank in a folder, written past the page cache; see :class:`core.storage.ByteSink`.

    Whole blocks go to the disk at once. The ragged ends of a write wait in memory for their
    neighbours, or for the commit.
    """

    def __init__(self, path: Path, options: WriteOptions | None = None) -> None:
        self.path = path
        self._options = options
        self._files: dict[str, _Ragged] = {}
        self._committed = False
        with disk_errors(f"cannot create {path}"):
            path.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size: int) -> None:
        file = NewFile(self.path / plain_name(name), size, self._options)
        self._files[name] = _Ragged(file)

    def write_at(self, name: str, offset: int, data: Buffer) -> None:
        if name not in self._files:
            raise CheckpointError(f"{name!r} is not open")
        view = memoryview(data).cast("B")
        size = self._files[name].file.size
        if offset < 0 or offset + len(view) > size:
            raise CheckpointError(
                f"write of {len(view)} bytes at {offset} does not fit {name}", why=f"{size} bytes"
            )
        self._files[name].write(offset, view)

    def commit(self) -> None:
        for ragged in self._files.values():
            ragged.finish()
        with disk_errors(f"cannot commit {self.path}"):
            sync(self.path)
        self._committed = True
        for ragged in self._files.values():
            ragged.file.close()

    def abort(self) -> None:
        for ragged in () if self._committed else self._files.values():
            ragged.file.abort()
        self._files.clear()


class _Ragged:
    """A file whose writes need not begin or end at a block."""

    def __init__(self, file: NewFile) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._ends: dict[int, tuple[bytearray, int]] = {}

    def write(self, offset: int, view: memoryview) -> None:
        block, end = self.file.block, offset + len(view)
        first, last = -(-offset // block) * block, end // block * block
        if last > first:
            self.file.write_range([Piece(offset, HostBytes(view))], first, last)
        for begin, stop in [(offset, min(first, end)), (max(last, first), end)]:
            if stop > begin:
                self._keep(begin, view[begin - offset : stop - offset])

    def finish(self) -> None:
        for start in sorted(self._ends):
            self._flush(start, self._ends[start][0])
        self._ends.clear()
        self.file.sync()

    def _keep(self, begin: int, part: memoryview) -> None:
        start = begin // self.file.block * self.file.block
        with self._lock:
            content, filled = self._ends.get(start, (bytearray(self.file.block), 0))
            content[begin - start : begin - start + len(part)] = part
            filled += len(part)
            self._ends[start] = content, filled
            if filled == self.file.block:
                del self._ends[start]
        if filled == self.file.block:
            self._flush(start, content)

    def _flush(self, start: int, content: bytearray) -> None:
        end = min(start + len(content), self.file.size)
        part = HostBytes(memoryview(content)[: end - start])
        self.file.write_range([Piece(start, part)], start, end)


class DirectSource:
    """Files of a folder, read past the page cache; see :class:`core.storage.ByteSource`.

    Where a file has digests, every chunk is held against them before a byte of it is handed out.
    Chunks are kept for a while and read ahead, so that many small reads in a row cost one.

    Args:
        path: folder, or a single file, which counts as its own folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, _Chunks] = {}

    def size(self, name: str) -> int:
        return self._file(name).size

    def read_into(self, name: str, offset: int, buffer: bytearray | memoryview) -> None:
        self._file(name).read_into(offset, memoryview(buffer).cast("B"))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    # No __del__: it would wait for threads wherever the collector runs, even in one that starts.
    # Files and executors that nobody holds any more end by themselves.

    def _file(self, name: str) -> _Chunks:
        if name not in self._files:
            path = self.path if self.path.is_file() else self.path / plain_name(name)
            self._files[name] = _Chunks(DirectFile(path), digests_of(path))
        return self._files[name]


class _Chunks:
    """A file read in whole chunks, each held against its digest."""

    def __init__(self, file: DirectFile, digests: Digests | None) -> None:
        if digests is not None:
            require_size(file.path, file.size, digests)
        self.size = file.size
        self._file = file
        self._start = 0 if digests is None else digests.start
        self._step = _CHUNK if digests is None else digests.chunk
        self._expected = {b: h for b, _, h in digests.ranges()} if digests else {}
        self._grid = list(cells(self._start, self._step, self.size))
        self._kept: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def read_into(self, offset: int, target: memoryview) -> None:
        end = offset + target.nbytes
        if end > self.size or offset < self._start:
            # What has no digests, or is not there: the file tells.
            stop = min(end, self._start) if end <= self.size else end
            self._file.read_into(offset, target[: stop - offset])
        first = max(offset, self._start)
        whole = []
        for index in range(self._index(first), self._index(end - 1) + 1) if end > first else ():
            begin, last = self._grid[index]
            if begin >= offset and last <= end and last - begin == self._step:
                whole.append((begin, last))
            else:
                begin, last = max(begin, first), min(last, end)
                data = self._chunk(index)[begin - self._grid[index][0] :]
                target[begin - offset : last - offset] = data[: last - begin]

        def read(cell: tuple[int, int]) -> None:
            self._read(cell[0], target[cell[0] - offset : cell[1] - offset])

        in_parallel(read, whole, threads=2)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._kept.clear()
        self._file.close()

    def _index(self, offset: int) -> int:
        return offset // self._step - self._start // self._step

    def _chunk(self, index: int) -> memoryview:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AHEAD, "fastpersist-read")
            for wanted in range(index, min(index + 1 + _AHEAD, len(self._grid))):
                if wanted not in self._kept:
                    self._kept[wanted] = self._pool.submit(self._load, wanted)
            self._kept.move_to_end(index)
            found = self._kept[index]
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found.result()

    def _load(self, index: int) -> memoryview:
        begin, end = self._grid[index]
        # The page before is left free, so that memory and file offset are congruent.
        shift = begin % 4096
        memory = pages(shift + end - begin)[shift:]
        self._read(begin, memory)
        return memory

    def _read(self, begin: int, target: memoryview) -> None:
        self._file.read_into(begin, target)
        if begin in self._expected:
            require_digest(self._file.path, begin, target, self._expected[begin])
