"""Reading files past the page cache, in parallel, and holding them against their digests."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from core.disk import disk_errors
from core.errors import CheckpointError
from core_fastpersist.direct.alignment import alignment_of, direct_flag
from core_fastpersist.direct.digests import Digests, digest
from core_fastpersist.direct.memory import address, buffer

_CHUNK = 16 * 2**20
_RING = 4 * 2**20


class DirectFile:
    """An existing file that is read by direct I/O where its mount allows.

    Any thread may read. Where memory and file offset are congruent modulo the alignment the disk
    writes straight into the target; else through a buffer.

    Args:
        path: existing file.

    Raises:
        CheckpointError: when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = alignment_of(path.parent)
        self._block, self._memory, self._direct = found.offset, found.memory, found.direct
        with disk_errors(f"cannot read {path}"):
            self._descriptor = self._open()
            self.size = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from byte ``offset`` on.

        Raises:
            CheckpointError: when the file ends before the target is full, or cannot be read.
        """
        end = offset + target.nbytes
        if offset < 0 or end > self.size:
            raise CheckpointError(
                f"{self.path} is truncated",
                why=f"bytes up to {end:,} are needed, it has {self.size:,}",
            )
        if target.nbytes == 0:
            return
        first, last = self._up(offset), end // self._block * self._block
        straight = (
            not target.readonly
            and last - first >= self._block
            and (address(target) - offset) % self._memory == 0
        )
        if not self._direct or straight:
            first, last = (first, last) if self._direct else (offset, end)
            self._read(first, target[first - offset : last - offset])
            ranges = [(offset, first), (last, end)]
        else:
            ranges = [(offset, end)]
        for begin, stop in ranges:
            self._through_buffer(begin, target[begin - offset : stop - offset])

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # DCP readers own sources and have no end of their own.
        if hasattr(self, "_descriptor"):
            self.close()

    def _open(self) -> int:
        if self._direct:
            try:
                return os.open(self.path, os.O_RDONLY | direct_flag())
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        return os.open(self.path, os.O_RDONLY)

    def _through_buffer(self, offset: int, target: memoryview) -> None:
        if target.nbytes == 0:
            return
        with buffer(_RING) as ring:
            position, end = offset, offset + target.nbytes
            while position < end:
                first = position // self._block * self._block
                length = min(len(ring), self._up(end) - first)
                count = self._read(first, ring[:length], needed=min(end, first + length) - first)
                last = min(end, first + count)
                target[position - offset : last - offset] = ring[position - first : last - first]
                position = last

    def _read(self, offset: int, target: memoryview, needed: int | None = None) -> int:
        """Read at least ``needed`` bytes, all unless given; returns how many there are."""
        wanted = target.nbytes if needed is None else needed
        done = 0
        with disk_errors(f"cannot read {self.path}"):
            while done < wanted:
                direct = self._direct  # before the call: another thread may give up during it
                try:
                    count = os.preadv(self._descriptor, [target[done:]], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    self._give_up_direct()
                    continue
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} is truncated", why=f"it ends at byte {offset + done:,}"
                    )
                done += count
        return done

    def _give_up_direct(self) -> None:
        """After a refusal, or where a file's last bytes are no whole block on this mount."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~direct_flag())
        # Not before: for a thread that sees this, a refusal is an error.
        self._direct = False

    def _up(self, offset: int) -> int:
        return -(-offset // self._block) * self._block


def read_file(
    path: Path,
    into: memoryview,
    *,
    offset: int = 0,
    threads: int = 2,
    digests: Digests | None = None,
) -> None:
    """Fill memory from a file, in parallel.

    Args:
        path: existing file.
        into: target; reading is fastest where its address is congruent with ``offset`` modulo 4096.
        offset: first byte of the file that is read.
        threads: how many read at once.
        digests: chunks that are read as a whole are held against these.

    Raises:
        CheckpointError: for a file that is too short, or a chunk that is damaged: file, byte range,
            expected and actual digest.
    """
    end = offset + into.nbytes
    expected = {} if digests is None else {(b, e): h for b, e, h in digests.ranges()}
    with DirectFile(path) as file:
        if digests is not None:
            require_size(path, file.size, digests)

        def read(cell: tuple[int, int]) -> None:
            begin, last = cell
            target = into[begin - offset : last - offset]
            file.read_into(begin, target)
            if cell in expected:
                require_digest(path, begin, target, expected[cell])

        step = _CHUNK if digests is None else digests.chunk
        in_parallel(read, _grid(offset, end, step, expected), threads)


def check_file(
    path: Path, digests: Digests, *, progress: Callable[[int], None] | None = None
) -> None:
    """Read a whole file and hold it against its digests.

    Args:
        path: existing file.
        digests: what it should be.
        progress: called with the number of bytes after each chunk.

    Raises:
        CheckpointError: at the first chunk that is damaged.
    """
    with DirectFile(path) as file:
        require_size(path, file.size, digests)
        with buffer(digests.chunk) as memory:
            for begin, end, expected in digests.ranges():
                target = memory[: end - begin]
                file.read_into(begin, target)
                require_digest(path, begin, target, expected)
                if progress is not None:
                    progress(end - begin)


def require_size(path: Path, size: int, digests: Digests) -> None:
    """Refuse a file of another size than its digests tell.

    Raises:
        CheckpointError: naming both sizes.
    """
    if size != digests.size:
        raise CheckpointError(
            f"{path} is {size:,} bytes long, not {digests.size:,}", fix="use an older checkpoint"
        )


def require_digest(path: Path, begin: int, data: memoryview, expected: str) -> None:
    """Refuse a damaged chunk.

    Raises:
        CheckpointError: naming file, byte range, expected and actual digest.
    """
    actual = digest(data)
    if actual != expected:
        raise CheckpointError(
            f"{path} is damaged in bytes {begin:,} to {begin + data.nbytes:,}",
            why=f"xxh3 is {actual}, and {expected} was written",
            fix="use an older checkpoint",
        )


def in_parallel(
    work: Callable[[tuple[int, int]], None], cells: Iterable[tuple[int, int]], threads: int
) -> None:
    """Work on cells in some threads; raises the first error."""
    todo = list(cells)
    if threads == 1 or len(todo) <= 1:
        for cell in todo:
            work(cell)
        return
    with ThreadPoolExecutor(threads, "fastpersist-read") as pool:
        for _ in pool.map(work, todo):
            pass


def _grid(
    begin: int, end: int, step: int, expected: dict[tuple[int, int], str]
) -> Iterator[tuple[int, int]]:
    """Cut a range at multiples of ``step``, and where a digest begins inside of a cell."""
    cuts = {first for first, _ in expected if begin < first < end}
    cuts |= set(range((begin // step + 1) * step, end, step))
    edges = [begin, *sorted(cuts), end]
    return ((first, last) for first, last in pairwise(edges) if last > first)
