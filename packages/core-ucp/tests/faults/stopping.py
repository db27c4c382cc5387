"""A command that stops at a point until it may go on; run by ``runpy`` in a process of its own."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

from core import storage
from core.cli import main
from core_ucp import universal

GIVEN: dict[str, Any] = globals()["given"]
"""By ``runpy``."""
POINT: str = GIVEN["point"]
"""Where it stops."""
PLACE: Path = GIVEN["place"]
"""File that it makes then; it goes on when there is one of that name with ``.go`` behind it."""
WORDS: list[str] = GIVEN["words"]
"""Of the command line."""


# Whoever runs the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def stop(owner: Any, name: str, point: str, count: int) -> None:
    """Stop before the call number ``count`` of a function, if that is the point."""
    original = getattr(owner, name)
    calls: list[int] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if point == POINT and len(calls) == count:
            PLACE.touch()
            while not PLACE.with_suffix(".go").exists():
                time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(owner, name, stopped)


for number, stream in ((".out", "stdout"), (".err", "stderr")):
    setattr(sys, stream, PLACE.with_suffix(number).open("w", buffering=1))
stop(storage.FileSink, "write_at", "writing", 2)
stop(storage.FileSink, "commit", "committing", 1)
stop(universal.Manifest, "write", "describing", 1)
# The last question whether the target is free has been asked then, and only the rename decides.
stop(storage.os, "walk", "publishing", 1)
main(WORDS)
