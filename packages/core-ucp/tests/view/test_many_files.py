"""A table of more files than a process may open reads all of them, from several threads."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core_ucp.view.files import Files

COUNT = 700


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """A process that may open only a few hundred files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_all_are_read(tmp_path: Path) -> None:
    for number in range(COUNT):
        (tmp_path / str(number)).write_bytes(number.to_bytes(2, "little"))
    files = Files(tmp_path, map(str, range(COUNT)))

    def read(number: int) -> int:
        buffer = bytearray(2)
        files.read_into(number, 0, memoryview(buffer))
        return int.from_bytes(buffer, "little")

    order = [(31 * n) % COUNT for n in range(3 * COUNT)]
    before = _open()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, order)) == order
    assert before < _open() < before + 300
    files.close()
    assert _open() == before
    assert read(5) == 5


def _open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])
