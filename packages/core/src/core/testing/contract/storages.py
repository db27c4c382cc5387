"""Storages: bytes written in any order by several sinks, complete on commit, gone on abort."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from core.contributions import Storage
from core.errors import CoreError
from core.storage import ByteSink
from core.testing.contract.check import Skip, checks_of, require, require_refused
from core.testing.contract.subject import Subject

_SIZE = 1_000_003
"""Bytes of the test file: no multiple of any block size."""

_PIECE = 65_537


def any_order(subject: Subject) -> None:
    """Pieces may be written in any order, from several threads, and gaps are zero."""
    content = os.urandom(_SIZE)
    offsets = list(range(0, _SIZE, _PIECE))
    for storage in _storages(subject):
        path = subject.folder() / "target"
        sink = storage.sink(path)
        sink.open("data", _SIZE)
        sink.open("gaps", 10_000)
        sink.open("empty", 0)
        sink.write_at("gaps", 5_000, b"middle")

        def write(mine: list[int], sink: ByteSink = sink) -> None:
            for offset in mine:
                sink.write_at("data", offset, content[offset : offset + _PIECE])

        _in_threads(write, [offsets[1::2][::-1], offsets[::2]])
        sink.commit()
        require((path / "data").read_bytes() == content, f"{storage.name!r} mixes up pieces")
        expected = bytes(5_000) + b"middle" + bytes(4_994)
        gaps = (path / "gaps").read_bytes() == expected
        require(gaps, f"{storage.name!r}: what is not written is not zero")
        require((path / "empty").stat().st_size == 0, f"{storage.name!r} fills an empty file")


def commit(subject: Subject) -> None:
    """commit() leaves complete files in a folder that may be new, and nothing else."""
    for storage in _storages(subject):
        path = subject.folder() / "parent" / "target"
        sink = storage.sink(path)
        sink.open("data", 4)
        sink.write_at("data", 0, b"done")
        sink.commit()
        what = f"commit() of {storage.name!r}"
        _require_files(path, {"data": b"done"}, what)
        _require_only(path.parent, {"target"}, what)
        sink.abort()
        _require_files(path, {"data": b"done"}, f"abort() after {what}")


def shared(subject: Subject) -> None:
    """Several sinks, as of several ranks, fill one folder without disturbing each other."""
    for storage in _storages(subject):
        path = subject.folder() / "target"
        sinks = {f"rank-{rank}": storage.sink(path) for rank in range(3)}
        for name, sink in sinks.items():
            sink.open(name, len(name))
            sink.write_at(name, 0, name.encode())
        for sink in sinks.values():
            _require_works(sink.commit, f"commit() of a second sink of {storage.name!r}")
        what = f"{storage.name!r} with several sinks"
        _require_files(path, {name: name.encode() for name in sinks}, what)
        _require_only(path.parent, {"target"}, what)


def abort(subject: Subject) -> None:
    """abort() removes the files of its own sink, and no others."""
    for storage in _storages(subject):
        path = subject.folder() / "target"
        kept, dropped = storage.sink(path), storage.sink(path)
        kept.open("kept", 4)
        kept.write_at("kept", 0, b"good")
        dropped.open("dropped", _SIZE)
        dropped.write_at("dropped", 7, b"half")
        dropped.abort()
        _require_works(kept.commit, f"commit() of {storage.name!r} beside an aborted sink")
        _require_files(path, {"kept": b"good"}, f"abort() of {storage.name!r}")
        _require_only(path.parent, {"target"}, f"abort() of {storage.name!r}")


def no_overwrite(subject: Subject) -> None:
    """A file name that is taken is refused, and what is there stays, also after abort()."""
    for storage in _storages(subject):
        path = subject.folder() / "target"
        path.mkdir()
        (path / "data").write_bytes(b"old")
        sink = storage.sink(path)
        try:
            what = f"{storage.name!r} overwrites a file that is there"
            require_refused(partial(sink.open, "data", 3), what)
        finally:
            sink.abort()
        _require_files(path, {"data": b"old"}, f"a refused open() of {storage.name!r}")


def out_of_range(subject: Subject) -> None:
    """A write outside of the file, and a name outside of the folder, are refused."""
    for storage in _storages(subject):
        sink = storage.sink(subject.folder() / "target")
        sink.open("data", 4)
        try:
            for offset, data in [(2, b"long"), (-1, b"x"), (5, b"x")]:
                what = f"{storage.name!r} accepts {len(data)} bytes at {offset} of a file of 4"
                require_refused(partial(sink.write_at, "data", offset, data), what)
            for name in ("../data", "/data", ""):
                what = f"{storage.name!r} accepts the file name {name!r}"
                require_refused(partial(sink.open, name, 4), what)
        finally:
            sink.abort()


def reads(subject: Subject) -> None:
    """A source reads any range of a file, of a folder or alone."""
    content = os.urandom(_SIZE)
    for storage in _storages(subject):
        folder = subject.folder()
        (folder / "data").write_bytes(content)
        for path in (folder, folder / "data"):
            source = storage.source(path)
            require(source.size("data") == _SIZE, f"{storage.name!r} tells a wrong size")
            for offset, length in [(0, 1), (4_095, 4_098), (_SIZE - 3, 3), (17, 500_000), (9, 0)]:
                buffer = bytearray(length)
                source.read_into("data", offset, buffer)
                right = bytes(buffer) == content[offset : offset + length]
                require(right, f"{storage.name!r} reads wrong bytes at {offset}")
            source.close()


def truncated(subject: Subject) -> None:
    """A file that ends too early, or is missing, gives a CoreError."""
    for storage in _storages(subject):
        folder = subject.folder()
        (folder / "data").write_bytes(b"short")
        source = storage.source(folder)
        for offset, length in [(0, 6), (5, 1), (100, 4)]:
            what = f"{storage.name!r} reads {length} bytes at {offset} of a file of 5"
            require_refused(partial(source.read_into, "data", offset, bytearray(length)), what)
        what = f"{storage.name!r} reads a missing file"
        require_refused(partial(source.read_into, "absent", 0, bytearray(1)), what)
        require_refused(partial(source.size, "absent"), what)
        source.close()


def _storages(subject: Subject) -> list[Storage]:
    if not subject.storages:
        raise Skip("the plugin has no storages")
    usable = [s for s in subject.storages if not s.works(subject.folder())]
    if not usable:
        reasons = [f"{s.name!r}: {s.works(subject.folder())}" for s in subject.storages]
        raise Skip(f"no storage works here: {'; '.join(reasons)}")
    return usable


def _in_threads(write: Callable[[list[int]], None], shares: list[list[int]]) -> None:
    errors: list[BaseException] = []

    def work(share: list[int]) -> None:
        try:
            write(share)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _require_files(folder: Path, wanted: Mapping[str, bytes], what: str) -> None:
    """Check names and contents of all files of a folder."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}
    missing = [name for name in wanted if name not in found]
    require(not missing, f"{what} leaves no {', '.join(missing)}")
    _require_only(folder, set(wanted), what)
    wrong = [name for name, content in wanted.items() if found[name] != content]
    require(not wrong, f"{what} leaves a wrong {', '.join(wrong)}")


def _require_works(action: Callable[[], object], what: str) -> None:
    try:
        action()
    except CoreError as error:
        raise AssertionError(f"{what} is refused: {error.what}") from None


def _require_only(folder: Path, names: set[str], what: str) -> None:
    found = {path.name for path in folder.iterdir()} - names
    require(not found, f"{what} leaves {', '.join(sorted(found))}")


CHECKS = checks_of(
    "storages", any_order, commit, shared, abort, no_overwrite, out_of_range, reads, truncated
)
