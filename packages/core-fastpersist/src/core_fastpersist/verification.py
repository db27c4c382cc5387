"""Reading every byte of what was saved, and naming file and chunk of every damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import xxhash

from core.disk import TEMPORARY, disk_errors, plain_name
from core.errors import CheckpointError
from core_fastpersist.coverage import SUFFIX, digests_of
from core_fastpersist.direct.digests import Digests, cells
from core_fastpersist.direct.memory import buffer
from core_fastpersist.direct.reading import DirectFile

Progress = Callable[[int, int], None]
"""Called from any thread with the bytes that were just read, and all that there are to read."""

_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 256 * 2**20
_PIECE = 8 * 2**20
_THREADS = 2


@dataclass(frozen=True)
class Finding:
    """What came of one file, or of one damaged chunk of it.

    Args:
        file: its path.
        status: ``ok``, ``warn`` for what no digest covers, ``fail`` for damage.
        what: what was found, in words.
        chunk: index of the damaged chunk; ``None`` where the finding is of the whole file.
        begin: first byte of the chunk, or of what was checked.
        end: first byte after it.
        expected: digest that was written down when the file was saved.
        actual: digest of what is there now.
    """

    file: Path
    status: Literal["ok", "warn", "fail"]
    what: str
    chunk: int | None = None
    begin: int | None = None
    end: int | None = None
    expected: str = ""
    actual: str = ""

    def as_json(self) -> dict[str, Any]:
        """Flat JSON object."""
        return {**asdict(self), "file": str(self.file)}


@dataclass(frozen=True)
class _File:
    """A file to be read, with the digests that it is held against."""

    path: Path
    digests: Digests

    @property
    def covered(self) -> int:
        return self.digests.size - self.digests.start


@dataclass(frozen=True)
class _Chunk:
    index: int
    begin: int
    end: int
    expected: str


def verify(path: Path, progress: Progress | None = None) -> list[Finding]:
    """Check sizes and digests of everything at ``path``.

    Args:
        path: a file, the folder of a checkpoint, or a folder of checkpoints ``step-*``.
        progress: is told of every piece that was read.

    Returns:
        one finding for each sound file, and one for each damage.

    Raises:
        CheckpointError: when there is nothing to verify.
    """
    found = list(_look(path))
    files = [each for each in found if isinstance(each, _File)]
    findings = [each for each in found if isinstance(each, Finding)]
    if not found:
        raise CheckpointError(f"nothing to verify in {path}", fix="name a checkpoint")
    total = sum(file.covered for file in files)

    def count(size: int) -> None:
        if progress is not None:
            progress(size, total)

    for file in files:
        findings += _read(file, count)
    return sorted(findings, key=lambda found: (found.file, found.begin or 0))


def _look(path: Path) -> Iterator[_File | Finding]:
    """What there is to read, and what is seen to be wrong without reading."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        yield _file(path)
        return
    steps = [folder for folder in (path, path / "checkpoints") if _steps(folder)]
    if not steps:
        yield from _folder(path)
        return
    for folder in _steps(steps[0]):
        if not (folder / _MANIFEST).is_file():
            yield Finding(folder, "fail", f"it has no {_MANIFEST}, so it is no checkpoint")
        yield from _folder(folder)
    for left in sorted(steps[0].glob(f"*{TEMPORARY}*")):
        yield Finding(left, "warn", "left by an interrupted save; the next one removes it")


def _steps(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(path for path in found if path.is_dir())


def _folder(folder: Path) -> Iterator[_File | Finding]:
    """The files of one checkpoint."""
    if (folder / _MANIFEST).is_file():
        yield from _sizes(folder)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path == folder / _MANIFEST:
            continue
        if not path.name.endswith(SUFFIX):
            yield _file(path)
        elif not path.with_name(path.name.removesuffix(SUFFIX)).is_file():
            yield Finding(path, "fail", "the file of these digests is missing")


def _file(path: Path) -> _File | Finding:
    try:
        digests = digests_of(path)
    except CheckpointError as error:
        return Finding(path, "fail", str(error).splitlines()[0])
    if digests is None:
        return Finding(path, "warn", "not covered by digests")
    return _File(path, digests)


def _sizes(folder: Path) -> Iterator[Finding]:
    """Files that are missing or have not the size that the manifest says."""
    path = folder / _MANIFEST
    try:
        with disk_errors(f"cannot read {path}"):
            if path.stat().st_size > _LARGEST_MANIFEST:
                raise ValueError("it is too large")
            listed = json.loads(path.read_bytes())["files"].items()
        sizes = {_inside(name): int(size) for name, size in listed}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CheckpointError) as e:
        yield Finding(path, "fail", f"the manifest is damaged: {str(e).splitlines()[0]}")
        return
    wrong = 0
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            wrong += 1
            state = "missing" if found is None else f"{found:,} bytes long"
            yield Finding(file, "fail", f"{state}; the manifest says {size:,} bytes")
    if not wrong:
        yield Finding(path, "ok", f"all files have the size it lists: {len(sizes):,}")


def _inside(name: str) -> str:
    for part in name.split("/"):
        plain_name(part)
    return name


def _read(file: _File, count: Callable[[int], None]) -> list[Finding]:
    """Read a file and compare, several chunks at a time."""
    chunks = [_Chunk(i, *cell) for i, cell in enumerate(file.digests.ranges())]
    found: list[Finding] = []
    try:
        with DirectFile(file.path) as opened:
            if opened.size != file.digests.size:
                found.append(_wrong_size(file, opened.size, chunks))
            whole = [chunk for chunk in chunks if chunk.end <= opened.size]
            with ThreadPoolExecutor(_THREADS, "fastpersist-verify") as pool:
                found += filter(None, pool.map(partial(_check, opened, count), whole))
    except CheckpointError as error:
        return [Finding(file.path, "fail", str(error))]
    if found:
        return found
    what = f"as saved, in chunks: {len(chunks):,}"
    return [Finding(file.path, "ok", what, None, file.digests.start, file.digests.size)]


def _wrong_size(file: _File, size: int, chunks: list[_Chunk]) -> Finding:
    what = f"{size:,} bytes long, and {file.digests.size:,} were saved"
    lost = next((chunk for chunk in chunks if chunk.end > size), None)
    if lost is None:
        return Finding(file.path, "fail", what)
    return Finding(file.path, "fail", what, lost.index, lost.begin, lost.end, lost.expected)


def _check(file: DirectFile, count: Callable[[int], None], chunk: _Chunk) -> Finding | None:
    place = chunk.index, chunk.begin, chunk.end, chunk.expected
    try:
        actual = _digest(file, chunk, count)
    except CheckpointError as error:
        return Finding(file.path, "fail", str(error), *place)
    if actual == chunk.expected:
        return None
    return Finding(file.path, "fail", "the bytes are not those that were saved", *place, actual)


def _digest(file: DirectFile, chunk: _Chunk, count: Callable[[int], None]) -> str:
    """Digest of a chunk as it is on the disk, in little memory however large it is."""
    hasher = xxhash.xxh3_128()
    with buffer(_PIECE) as room:
        for begin, end in cells(chunk.begin, _PIECE, chunk.end):
            part = room[: end - begin]
            file.read_into(begin, part)
            hasher.update(part)
            count(len(part))
    return hasher.hexdigest()
