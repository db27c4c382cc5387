"""Files past the page cache: what is read is what was written, whatever sizes, pieces and threads."""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import CheckpointError
from core_fastpersist.direct import alignment
from core_fastpersist.direct.alignment import Alignment, alignment_of
from core_fastpersist.direct.digests import Digests, digest
from core_fastpersist.direct.memory import address, buffer, pages
from core_fastpersist.direct.newfile import NewFile, WriteOptions
from core_fastpersist.direct.pieces import HostBytes, Piece, Pieces
from core_fastpersist.direct.reading import DirectFile, check_file, read_file

SIZES = st.one_of(st.integers(0, 20_000), st.sampled_from([2**16, 2**18 + 1, 2**20 - 1, 3 * 2**19]))
QUIET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Late:
    """Bytes that have no address, as those of a GPU."""

    view: memoryview | None = None

    def __init__(self, data: memoryview) -> None:
        self._data, self.nbytes = data, data.nbytes

    def copy(self, begin: int, end: int, into: memoryview) -> None:
        into[:] = self._data[begin:end]


def content(size: int, seed: int, shift: int) -> memoryview:
    """Bytes at an address that is ``shift`` past a page."""
    view = pages(size + shift)[shift:]
    pattern = bytes((seed + 31 * i) % 251 for i in range(251))
    view[:] = (pattern * (size // 251 + 1))[:size]
    return view


@QUIET
@given(
    size=SIZES,
    cuts=st.lists(st.floats(0, 1), max_size=12),
    gaps=st.booleans(),
    shift=st.sampled_from([0, 1, 64, 512, 4095]),
    late=st.booleans(),
    head=st.sampled_from([0, 1, 4096, 5000]),
    threads=st.integers(1, 4),
    direct=st.sampled_from([None, False]),
)
def test_any_pieces_make_the_file(
    tmp_path: Path,
    size: int,
    cuts: list[float],
    gaps: bool,
    shift: int,
    late: bool,
    head: int,
    threads: int,
    direct: bool | None,
) -> None:
    data = content(size, seed=len(cuts), shift=shift)
    edges = sorted({0, size, *(int(cut * size) for cut in cuts)})
    expected = bytearray(size)
    pieces = []
    for index, (begin, end) in enumerate(pairwise(edges)):
        if gaps and index % 3 == 2:
            continue
        part = data[begin:end]
        pieces.append(Piece(begin, Late(part) if late and index % 2 else HostBytes(part)))
        expected[begin:end] = part
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    options = WriteOptions(chunk=2**16, ring=2**13, threads=threads, direct=direct)
    start = min(head, size)
    with NewFile(path, size, options) as file:
        digests = file.write(pieces, start=start, keep_head=head)
        file.sync()
        kept = min(-(-head // file.block) * file.block, size)
        assert path.read_bytes()[:kept] == bytes(kept)
        file.write_head(pieces, keep_head=head)
        file.sync()
    assert path.read_bytes() == expected
    assert Digests.from_json(digests.as_json()) == digests
    assert [found for *_, found in digests.ranges()] == [
        digest(bytes(expected[begin:end])) for begin, end, _ in digests.ranges()
    ]
    assert sum(end - begin for begin, end, _ in digests.ranges()) == size - start
    check_file(path, digests)


@QUIET
@given(
    size=SIZES.filter(bool),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    shift=st.sampled_from([0, 1, 64, 512, 4095]),
    threads=st.integers(1, 3),
)
def test_any_range_is_read(
    tmp_path: Path, size: int, part: tuple[float, float], shift: int, threads: int
) -> None:
    path = tmp_path / "read"
    data = bytes(content(size, 3, 0))
    path.write_bytes(data)
    begin, end = sorted(int(share * size) for share in part)
    into = pages(end - begin + shift)[shift:]
    read_file(path, into, offset=begin, threads=threads)
    assert into == data[begin:end]
    with DirectFile(path) as file, pytest.raises(CheckpointError, match="truncated"):
        file.read_into(end, memoryview(bytearray(size - end + 1)))


@QUIET
@given(size=st.integers(1, 300_000), where=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_named(
    tmp_path: Path, size: int, where: float, bit: int
) -> None:
    path = tmp_path / "flipped"
    path.unlink(missing_ok=True)
    with NewFile(path, size, WriteOptions(chunk=2**16)) as file:
        digests = file.write([Piece(0, HostBytes(content(size, 5, 0)))])
        file.sync()
    place = min(int(where * size), size - 1)
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    begin = place // 2**16 * 2**16
    with pytest.raises(CheckpointError, match=f"damaged in bytes {begin:,} to") as caught:
        read_file(path, pages(size), digests=digests)
    assert digest(bytes(damaged[begin : begin + 2**16])) in caught.value.why
    path.write_bytes(damaged[:-1])
    with pytest.raises(CheckpointError, match="bytes long, not"):
        check_file(path, digests)


def test_direct_io_is_really_tried(tmp_path: Path) -> None:
    found = alignment_of(tmp_path)
    assert found == alignment_of(tmp_path)
    assert bool(found.reason) != found.direct
    assert found.offset % 512 == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_known", {})
    found = alignment_of(Path("/proc"))
    assert not found.direct
    assert found.reason


def test_a_range_in_any_order(tmp_path: Path) -> None:
    size = 100_001
    data = content(size, 9, 64)
    with NewFile(tmp_path / "file", size, WriteOptions(chunk=2**14)) as file:
        for begin in (65536, 0, 32768):
            end = min(begin + 32768, size) if begin < 65536 else size
            file.write_range([Piece(begin, HostBytes(data[begin:end]))], begin, end)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data


def test_a_taken_name_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="File exists"):
        NewFile(tmp_path / "taken", 3)
    assert (tmp_path / "taken").read_bytes() == b"old"


def test_an_abandoned_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), NewFile(tmp_path / "file", 10_000):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_overlapping_pieces_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Pieces([Piece(0, HostBytes(b"abc")), Piece(2, HostBytes(b"d"))])


def test_alignment_larger_than_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with large blocks: everything still lands where it belongs."""
    known = {tmp_path.stat().st_dev: Alignment(direct=False, memory=2**16, offset=2**16)}
    monkeypatch.setattr(alignment, "_known", known)
    data = content(300_000, 1, 64)
    with NewFile(tmp_path / "file", 300_000, WriteOptions(chunk=2**12, ring=2**12)) as file:
        digests = file.write([Piece(0, HostBytes(data))], start=100, keep_head=100)
        file.write_head([Piece(0, HostBytes(data))], keep_head=100)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data
    assert digests.chunk == 2**16
    check_file(tmp_path / "file", digests)


def test_buffers_are_used_again() -> None:
    with buffer(2**16) as first:
        place = address(first)
    with buffer(2**16) as second:
        assert address(second) == place
        assert place % mmap.PAGESIZE == 0


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(value=NONSENSE, key=st.sampled_from(["start", "chunk", "size", "hashes", "algorithm", ""]))
def test_nonsense_is_no_digests(value: object, key: str) -> None:
    good = Digests(0, 4096, 5000, ("0" * 32, "1" * 32)).as_json()
    bad = {**good, key: value} if key else value
    try:
        found = Digests.from_json(bad)
    except CheckpointError:
        return
    assert found.as_json() == good or key in ("start", "chunk", "size", "")
