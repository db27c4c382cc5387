"""A bar for work that is counted in steps: on standard error, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def steps_bar(label: str, total: int) -> Generator[Callable[[str], None]]:
    """Show how many steps are done and how long the rest takes.

    Args:
        label: what is being done.
        total: steps in all.

    Yields:
        what is to be called after every step, with a word on what comes next or was done.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total, text="")
        yield lambda text: bars.update(task, advance=1, text=text)
