"""A bar for work that is counted in bytes: on standard error, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Is told, from any thread, of the bytes that are done since the last call."""

    def __call__(self, size: int, total: int | None = None) -> None:
        """Go on by ``size`` bytes, of ``total`` in all, where that was not known before."""


@contextmanager
def bytes_bar(label: str, total: int | None = None) -> Generator[Advance]:
    """Show how many bytes are done, how fast, and how long the rest takes.

    Args:
        label: what is being done.
        total: bytes in all, where known.

    Yields:
        what is to be told of every number of bytes.
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)

        def advance(size: int, total: int | None = None) -> None:
            bars.update(task, advance=size, total=total)

        yield advance


def _silent(size: int, total: int | None = None) -> None:
    """Show nothing: there is no terminal."""
