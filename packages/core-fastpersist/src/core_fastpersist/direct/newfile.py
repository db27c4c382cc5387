"""A new file, written in parallel chunks past the page cache.

This is the NVMe-shaped writing of FastPersist (arXiv 2406.13768, section on optimized writes): large
aligned blocks, and filling one buffer while another drains, here one buffer a thread. Where memory and
file offset are congruent modulo the alignment, the bytes go from where they lie and no buffer is used.
The last block is padded, and the file is cut to its size afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from core.errors import CheckpointError
from core.system import preallocate, start_writing
from core_fastpersist.direct.alignment import alignment_of, direct_flag, refused
from core_fastpersist.direct.digests import Digests, cells
from core_fastpersist.direct.memory import buffer
from core_fastpersist.direct.pieces import Piece, Pieces
from core_fastpersist.direct.room import writing

_SMALLEST_DIRECT = 32 * 2**10
_MOST_VECTORS = 512


@dataclass(frozen=True)
class WriteOptions:
    """How a file is written.

    Args:
        chunk: bytes of one write, and of one digest; a power of two.
        threads: how many write at once, 1 to 4.
        ring: bytes of a thread's buffer for what cannot go straight from memory; a power of two.
        direct: direct I/O or not; ``None`` for direct where the mount can.
    """

    chunk: int = 16 * 2**20
    threads: int = 4
    ring: int = 8 * 2**20
    direct: bool | None = None


@dataclass
class Written:
    """What a file has cost.

    Attributes:
        straight: bytes that went to the disk from where they lay.
        copied: bytes that went through a buffer.
        direct: whether all of it went past the page cache.
    """

    straight: int = 0
    copied: int = 0
    direct: bool = True


class NewFile:
    """A file that did not exist before.

    Args:
        path: where; the folder exists.
        size: bytes.
        options: how it is written.

    Attributes:
        block: bytes that places of writes are multiples of.
        written: what it has cost so far.

    Raises:
        CheckpointError: when the path is taken, or there is no room for ``size`` bytes.
    """

    def __init__(self, path: Path, size: int, options: WriteOptions | None = None) -> None:
        self.path = path
        self.size = size
        self.options = options or WriteOptions()
        self.written = Written()
        found = alignment_of(path.parent)
        self.block, self._memory = found.offset, found.memory
        wanted = found.direct if self.options.direct is None else self.options.direct
        self._direct = self.written.direct = wanted and found.direct
        self._lock = threading.Lock()
        self._padded = -(-size // self.block) * self.block
        with writing(path, size):
            self._descriptor = _create(path, self._direct)
        try:
            self._reserve()
        except BaseException:
            self.abort()
            raise

    def write(self, pieces: Sequence[Piece], *, start: int = 0, keep_head: int = 0) -> Digests:
        """Write all bytes of the file.

        Args:
            pieces: sorted, without overlap; gaps are zero.
            start: first byte that the digests cover.
            keep_head: the blocks with the first ``keep_head`` bytes are left zero, for
                :meth:`write_head`; what of them lies after ``start`` counts in the digests.

        Returns:
            digests of what was written, taken from memory on the way.

        Raises:
            CheckpointError: when the disk refuses, in whichever thread.
        """
        found = Pieces(pieces)
        if found.end > self.size:
            raise ValueError(f"pieces end at byte {found.end} of a file of {self.size}")
        first = self._up(keep_head)
        chunk = max(self.options.chunk, self.block)
        hashes: dict[int, str] = {}

        def work(cell: tuple[int, int]) -> None:
            begin, end = cell
            hasher = xxhash.xxh3_128()
            if begin < first:
                hasher.update(_gathered(found, max(begin, start), min(first, end)))
            if end > first:
                self._write_range(found, max(begin, first), end, max(begin, start), hasher.update)
            hashes[begin] = hasher.hexdigest()

        begin = min(start, first) // chunk * chunk
        self._in_threads(work, cells(begin, chunk, self.size))
        # A cell that ends before the digests begin was written, too.
        covered = [b for b, e in cells(begin, chunk, self.size) if e > start]
        return Digests(start, chunk, self.size, tuple(hashes[b] for b in covered))

    def write_head(self, pieces: Sequence[Piece], keep_head: int) -> None:
        """Write the blocks that :meth:`write` has left out.

        Args:
            pieces: all pieces of the file, for the last of these blocks may hold more than a head.
            keep_head: as for :meth:`write`.
        """
        end = min(self._up(keep_head), self.size)
        self._write_range(Pieces(pieces), 0, end, end, lambda _: None)

    def write_range(self, pieces: Sequence[Piece], begin: int, end: int) -> None:
        """Write a part of the file; any thread, any order.

        Args:
            pieces: what the part is made of.
            begin: first byte, a multiple of :attr:`block`.
            end: first byte after it, a multiple of :attr:`block` or the end of the file.
        """
        found = Pieces(pieces)

        def work(cell: tuple[int, int]) -> None:
            self._write_range(found, *cell, cell[1], lambda _: None)

        self._in_threads(work, cells(begin, max(self.options.chunk, self.block), end))

    def sync(self) -> None:
        """Make the bytes durable.

        Raises:
            CheckpointError: when the disk refuses. The file is lost then: the kernel has dropped
                what it could not write, and a second call would find nothing to complain of.
        """
        with writing(self.path, self.size):
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
            if not self._direct:
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def abort(self) -> None:
        """Close the file and remove it."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _reserve(self) -> None:
        with writing(self.path, self.size):
            if not preallocate(self._descriptor, self._padded):
                os.ftruncate(self._descriptor, self._padded)

    def _in_threads(
        self, work: Callable[[tuple[int, int]], None], cells: Iterable[tuple[int, int]]
    ) -> None:
        """Work on all cells; the first error stops every thread and is raised."""
        found = list(cells)
        waiting = iter(found)
        taking = threading.Lock()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                while not errors:
                    with taking:
                        cell = next(waiting, None)
                    if cell is None:
                        return
                    work(cell)
            except BaseException as error:
                errors.append(error)

        more = max(0, min(self.options.threads, len(found)) - 1)
        # No executor: it takes no work while the interpreter ends, and a write may be under way.
        helpers = [threading.Thread(target=run) for _ in range(more)]
        started: list[threading.Thread] = []
        try:
            for helper in helpers:
                helper.start()
                started.append(helper)
            run()
        finally:
            for helper in started:
                helper.join()
        if errors:
            raise errors[0]

    def _write_range(
        self,
        pieces: Pieces,
        begin: int,
        end: int,
        hash_from: int,
        hash: Callable[[memoryview], None],
    ) -> None:
        """Write a range that begins at a block; its last block is padded with zeros."""
        with buffer(max(self.options.ring, self.block)) as ring:
            vectors: list[memoryview] = []
            position = waiting = begin
            filled = 0

            def flush() -> None:
                nonlocal waiting, filled
                self._put(vectors, waiting)
                vectors.clear()
                waiting, filled = position, 0

            def add(view: memoryview) -> None:
                nonlocal position
                vectors.append(view)
                last = min(position + view.nbytes, end)
                if last > hash_from:
                    hash(view[max(0, hash_from - position) : last - position])
                position += view.nbytes
                if len(vectors) == _MOST_VECTORS:
                    flush()

            for first, last, view in self._segments(pieces, begin, self._up(end)):
                if view is not None:
                    add(view)
                    self._count(straight=view.nbytes)
                    continue
                for part in range(first, last, len(ring)):
                    length = min(len(ring), last - part)
                    if filled + length > len(ring):
                        flush()
                    target = ring[filled : filled + length]
                    pieces.gather(part, part + length, target)
                    filled += length
                    add(target)
                    self._count(copied=length)
            flush()

    def _segments(
        self, pieces: Pieces, begin: int, end: int
    ) -> Iterator[tuple[int, int, memoryview | None]]:
        """Cut a range into what goes straight from memory, with its view, and what is copied."""
        position = begin
        for piece in pieces.within(begin, end):
            if piece.shift is None or piece.shift % self._memory:
                continue
            first = self._up(max(begin, piece.offset))
            last = min(end, piece.end) // self.block * self.block
            if last - first < _SMALLEST_DIRECT:
                continue
            if first > position:
                yield position, first, None
            view = piece.source.view
            assert view is not None
            yield first, last, view[first - piece.offset : last - piece.offset]
            position = last
        if position < end:
            yield position, end, None

    def _put(self, vectors: list[memoryview], offset: int) -> None:
        """Write buffers one after the other; goes on after a short write."""
        rest, first = list(vectors), offset
        while rest:
            direct = self._direct  # before the call: another thread may give up during it
            try:
                count = os.pwritev(self._descriptor, rest, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    with writing(self.path, self.size):
                        raise
                self._give_up_direct(error.strerror or str(error))
                continue
            if direct:
                # Past a cut that is no block, the rest could not be written directly.
                count -= count % self.block
            if count == 0:
                if not direct:
                    raise CheckpointError(f"cannot write {self.path}", why="the disk takes nothing")
                self._give_up_direct("a block was written in part")
            rest, offset = _after(rest, count), offset + count
        if not self._direct:
            start_writing(self._descriptor, first, offset - first)

    def _give_up_direct(self, reason: str) -> None:
        with self._lock:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~direct_flag())
            # Not before: for a thread that sees this, a refusal is an error.
            self._direct = self.written.direct = False
        refused(self.path.parent, reason)

    def _up(self, offset: int) -> int:
        return -(-offset // self.block) * self.block

    def _count(self, straight: int = 0, copied: int = 0) -> None:
        with self._lock:
            self.written.straight += straight
            self.written.copied += copied


def _create(path: Path, direct: bool) -> int:
    """Create and lock a file: whoever finds it and can lock it knows that its writer was killed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | (direct_flag() if direct else 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        os.close(descriptor)  # it was taken for a leftover before it was locked


def _gathered(pieces: Pieces, begin: int, end: int) -> bytes:
    data = bytearray(max(0, end - begin))
    pieces.gather(begin, end, memoryview(data))
    return bytes(data)


def _after(vectors: list[memoryview], count: int) -> list[memoryview]:
    """What is left of some buffers after ``count`` bytes of them were written."""
    for index, view in enumerate(vectors):
        if count < view.nbytes:
            return [view[count:], *vectors[index + 1 :]]
        count -= view.nbytes
    return []
